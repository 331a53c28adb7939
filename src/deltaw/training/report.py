"""report.html: one self-contained file with the table, the two curves, what was run and on what. No script, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from deltaw.training.chart import chart
from deltaw.training.plots import COLOURS
from deltaw.training.verdict import Compared, markdown, size, table

STYLE = """
:root { color-scheme: light dark; --bg:#fbfbf9; --card:#fff; --ink:#1c1d20; --soft:#62656d; --rule:#e4e4df; --mark:#eef4fb; LIGHT }
@media (prefers-color-scheme: dark) { :root { --bg:#131417; --card:#1b1d21; --ink:#e9e9e6; --soft:#9b9ea6; --rule:#30333a; --mark:#1d2a38; DARK } }
* { box-sizing: border-box }
body { margin:0; background:var(--bg); color:var(--ink); font:15px/1.55 system-ui, sans-serif }
main { max-width:1200px; margin:0 auto; padding:40px 24px 64px }
h1 { font-size:26px; margin:0 0 4px; letter-spacing:-.01em } h2 { font-size:16px; margin:36px 0 12px }
.sub { color:var(--soft); margin:0 0 24px }
.take { background:var(--mark); border-left:4px solid var(--c0); padding:14px 18px; border-radius:4px; font-size:16px; margin:0 }
.wide { overflow-x:auto } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { padding:8px 8px; text-align:right; border-bottom:1px solid var(--rule); white-space:nowrap }
th { color:var(--soft); font-weight:600; font-size:13px } th:first-child,td:first-child { text-align:left }
tr.taken td { background:var(--mark); font-weight:600 }
.dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:8px }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:20px }
figure { margin:0; background:var(--card); border:1px solid var(--rule); border-radius:8px; padding:16px }
figcaption { font-weight:600; margin-bottom:8px } svg { width:100%; height:auto; display:block }
.grid { stroke:var(--rule) } .axis { stroke:var(--soft) } .tick,.label { fill:var(--soft); font-size:12px } .name { font-size:12px; font-weight:600; paint-order:stroke; stroke:var(--card); stroke-width:5px; stroke-linejoin:round }
pre { background:var(--card); border:1px solid var(--rule); border-radius:8px; padding:14px; overflow-x:auto; font-size:13px; white-space:pre-wrap; overflow-wrap:anywhere }
ul { padding-left:20px; margin:0 } .facts { color:var(--soft); font-size:13px }
"""
DARK = ("#5AB0F0", "#FF8A4C", "#2FC79A", "#E79AC4", "#F2B84B", "#8CCBF2", "#B18CD0", "#A8ABB2")


def report(
    rows: Sequence[Compared], take: str, sentence: str, runs: Sequence[Mapping[str, Any]], command: str, config: str
) -> str:
    """The page. `runs`: the results of every run; `command` and `config`: how to do it again."""
    first = runs[0]
    metric = first["metric"]
    lines = table(rows, metric)
    head = "".join(f"<th>{escape(c)}</th>" for c in lines[0])
    body = "\n".join(
        f'<tr{" class=taken" if cells[0] == take else ""}><td><span class="dot" style="background:var(--c{i % 8})"></span>{escape(cells[0])}</td>'
        + "".join(f"<td>{escape(c)}</td>" for c in cells[1:])
        + "</tr>"
        for i, cells in enumerate(lines[1:])
    )
    over_epochs = chart(
        [(r.method, [(e, y) for e, _, y in r.curve] or [(0.0, r.score)]) for r in rows], "epoch", f"validation {metric}"
    )
    over_time = chart(
        [(r.method, [(s, y) for _, s, y in r.curve] or [(0.0, r.score)]) for r in rows],
        "training time (s)",
        f"validation {metric}",
    )
    style = STYLE.replace("LIGHT", _palette(COLOURS)).replace("DARK", _palette(DARK), 1)
    notes = "".join(f"<li>{escape(n)}</li>" for n in first["notes"])
    facts = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    where = machine_text(first["machine"])
    largest = max(rows, key=lambda r: r.kept_bytes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(first["recipe"])}: {len(rows)} methods compared</title><style>{style}</style></head>
<body><main>
<h1>{escape(first["recipe"])}: {len(rows)} methods compared</h1>
<p class="sub">{escape(first["model"])} · {escape(where)} · {rows[0].seeds} seed{"s" if rows[0].seeds > 1 else ""}</p>
<p class="take">{escape(sentence)}</p>
<h2>Results</h2>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="facts">Scores: best evaluation on the validation set; test: the chosen weights on examples that no choice has seen.
Seconds: training only. Peak memory: of the method's own process; above model: what training added to the loaded model and data.
Kept per task: what must be stored beside the shared base ({escape(largest.method)}: {size(largest.kept_bytes)}).</p>
<h2>Curves</h2>
<div class="pair">
<figure><figcaption>{escape(metric)} over epochs</figcaption>{over_epochs}</figure>
<figure><figcaption>{escape(metric)} over training time</figcaption>{over_time}</figure>
</div>
<h2>Model and data</h2><ul>{notes}</ul>
<h2>Do it again</h2>
<pre>{escape(command)}</pre>
<details><summary>Resolved configuration</summary><pre>{escape(config)}</pre></details>
<p class="facts">{escape(facts)}</p>
</main></body></html>
"""


def machine_text(machine: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    if machine["gpu"]:
        return str(machine["gpu"])
    features = "".join(f", {f}" for f in machine["features"])
    return f"{machine['cores']} cores, {machine['threads']} threads used ({machine['architecture']}{features})"


def page(rows: Sequence[Compared], sentence: str, runs: Sequence[Mapping[str, Any]], command: str) -> str:
    """table.md: the comparison for a README or an issue, with what is needed to repeat it."""
    first = runs[0]
    seeds = ", ".join(str(s) for s in dict.fromkeys(r["seed"] for r in runs))
    return "\n".join(
        [
            markdown(rows, first["metric"]),
            "",
            sentence,
            "",
            f"- command: `{command}`",
            f"- seed: {seeds}",
            *(f"- {note}" for note in first["notes"]),
            f"- versions: {', '.join(f'{k} {v}' for k, v in first['versions'].items())}",
            f"- machine: {machine_text(first['machine'])}",
            "",
        ]
    )


def _palette(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}:{c};" for i, c in enumerate(colours))


def results_json(
    rows: Sequence[Compared], take: str, sentence: str, runs: Sequence[Mapping[str, Any]], command: str
) -> str:
    """results.json of a comparison."""
    methods = [
        {
            "method": r.method,
            "trainable": r.trainable,
            "share": r.share,
            "best_validation": r.score,
            "spread": r.spread,
            "best_validation_loss": r.loss,
            "test": r.test,
            "seconds": r.seconds,
            "peak_bytes": r.peak_bytes,
            "peak_above_model_bytes": r.peak_above_model_bytes,
            "kept_bytes": r.kept_bytes,
            "seeds": r.seeds,
        }
        for r in rows
    ]
    return (
        json.dumps(
            {
                "command": command,
                "metric": runs[0]["metric"],
                "take": take,
                "why": sentence,
                "methods": methods,
                "runs": list(runs),
            },
            indent=2,
        )
        + "\n"
    )
