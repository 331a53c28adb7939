"""The how-to pages' Python runs as it stands."""

import re
from pathlib import Path

import pytest

from deltaw.compose.combiner import combiners

PAGES = Path(__file__).resolve().parents[3] / "docs" / "how-to"


@pytest.mark.parametrize("name", ["combine.md", "analyze.md"])
def test_python_blocks_run_in_order(name):
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / name).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    space = {}
    try:
        for block in blocks:
            exec(compile(block, name, "exec"), space)
    finally:
        combiners._known.pop("mean", None)


def test_every_way_to_combine_is_in_the_table():
    text = (PAGES / "combine.md").read_text()
    assert all(f"| `{name}` |" in text for name, _ in combiners.items())
