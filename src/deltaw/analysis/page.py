"""One self-contained HTML page of headings, sentences, tables and pictures. No scripts, no outside files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --bg: #fdfdfc; --soft: #6b7076; --line: #e4e4e0; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8e8e6; --bg: #16181a; --soft: #9aa0a6; --line: #303438; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 1080px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .9rem; }
figure { margin: 1.1rem 0 1.6rem; } figcaption { margin-bottom: .4rem; } figcaption span { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; background: white; border-radius: 6px; padding: 6px; box-sizing: border-box; border: 1px solid var(--line); }
@media (max-width: 700px) { body { margin: 1.2rem auto; padding: 0 .8rem; } img { max-width: 200vw; } }
div.wide { overflow-x: auto; } td.text, th.text { text-align: left; white-space: normal; min-width: 14rem; } ul { padding-left: 1.2rem; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { text-align: right; padding: .18rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
details > summary { cursor: pointer; color: var(--soft); }
"""


def png(figure: Any) -> bytes:
    """The figure as a PNG file. Software and date are left out: equal figures give equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def image(data: bytes, title: str, text: str) -> str:
    """A picture under its title and a sentence on how to read it. On a phone it is scrolled, not shrunk to nothing."""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong> <span>{escape(text)}</span></figcaption>"
        f'<div class="wide"><img alt="{escape(f"{title} {text}", quote=True)}" src="{source}"></div></figure>'
    )


def sentences(said: Sequence[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in said)}</ul>"


def paragraph(text: str, soft: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], name: str = "table", open_up_to: int = 12
) -> str:
    """A table of `columns` (key -> heading); long ones are folded away under their `name`."""
    if not rows:
        return ""
    head = "".join(
        f"<th{' class=text' if _is_text(rows[0].get(key)) else ''}>{escape(name)}</th>" for key, name in columns.items()
    )
    body = "".join("<tr>" + "".join(_cell(row.get(key)) for key in columns) + "</tr>" for row in rows)
    made = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if len(rows) <= open_up_to:
        return made
    return f"<details><summary>{escape(name)}: {len(rows)} rows</summary>{made}</details>"


def document(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p class=soft>{escape(subtitle)}</p>{''.join(parts)}</body></html>\n"
    )


def _cell(value: Any) -> str:
    if _is_text(value):
        return f'<td class="text">{escape(value)}</td>'
    if isinstance(value, float):
        return f"<td>{value:.3g}</td>" if abs(value) < 1000 else f"<td>{value:,.0f}</td>"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"<td>{value:,}</td>"
    return f"<td>{'–' if value is None else escape(str(value))}</td>"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and " " in value
