"""Every Python example of the documentation runs as it stands, from the top of its page to the bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltaw.compose.combiner import combiners

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: str(p.relative_to(ROOT))
)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(combiners, "_known", dict(combiners.items()))  # a page shows how to register one
    names: dict[str, object] = {"__name__": "__main__"}
    for code in BLOCK.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), names)
