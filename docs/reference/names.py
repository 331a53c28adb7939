"""Writes names.md: every public name of `deltaw` with its call and the first sentence of its docstring.

python docs/reference/names.py
"""

from __future__ import annotations

import inspect
from pathlib import Path

import deltaw as dw


def page() -> str:
    """The text of names.md."""
    lines = ["# Every name", "", "`help(dw.attach)` has formulas, shapes and errors. Written by `names.py`.", ""]
    lines += ["| name | what |", "|---|---|"]
    for name in dw.__all__:
        if name not in ("__version__", "errors"):
            said = (inspect.getdoc(getattr(dw, name)) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| `dw.{name}` | {said} |")
    lines.append("| `dw.errors` | Every exception; `DeltawError` is the root, and each is also a builtin. |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("names.md").write_text(page(), encoding="utf-8")
