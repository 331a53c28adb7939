"""What the how-to page on combining lists."""

from pathlib import Path

from deltaw.compose.combiner import combiners

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "combine.md"


def test_every_way_to_combine_is_in_the_table():
    text = PAGE.read_text()
    assert all(f"| `{name}` |" in text for name, _ in combiners.items())
