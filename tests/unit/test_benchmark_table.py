"""The README's figures are those of the committed results, and of nothing else."""

from __future__ import annotations

from benchmarks import table
from benchmarks.__main__ import CLAIMS


def test_the_readme_quotes_the_table_and_the_table_is_made_from_the_results():
    text = table.FILE.read_text()
    assert text == table.table(table.read())
    assert table.quoted(table.README.read_text()) == text
    assert set(CLAIMS) <= set(table.TITLES)


def test_lines_name_case_ratio_target_and_what_was_missed():
    rows = [
        {"what": "MiniLM: deltaw / PEFT", "ratio": 0.5, "target": 0.6, "met": True},
        {"what": "Llama: deltaw / PEFT", "ratio": 0.7, "target": 0.6, "met": False},
        {"what": "MiniLM: PEFT / full", "ratio": 0.9},
    ]
    lines = table.lines_of({"claim": "S4", "rows": rows})
    assert len(lines) == 1, "a comparison without a target is no claim"
    assert lines[0].endswith("| deltaw / PEFT | MiniLM **0.50** (≤ 0.60); Llama **0.70** (≤ 0.60, **missed**) |")
