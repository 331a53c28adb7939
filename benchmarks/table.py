"""The table of all claims, from results/*.json: results/table.md, and between two marks in the README.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
FILE = RESULTS / "table.md"
BEGIN, END = "<!-- benchmarks: begin -->\n", "<!-- benchmarks: end -->\n"
TITLES = {
    "S1": "a training step, exact fp32, rank 8 on all linears",
    "S2": "the same with dropout .05",
    "S3": "the same, DoRA",
    "S4": "the same on an int8 base, against PEFT's LoRA in fp32",
    "S5": "int8 base against full fine-tuning",
    "S6": "gravitational waves: training time until full fine-tuning's best AUC",
    "S7": "peak memory of a step, dropout .05",
    "S8": "a batch of 32 rows with several adapters, against the base alone",
    "S9": "attach, load, switch, import",
    "S10": "merged inference",
    "S11": "a whole fine-tuning at the same accuracy",
}


def lines_of(result: dict[str, Any]) -> list[str]:
    """One line per comparison of a claim: the ratio of each case with its target."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault(row["what"].rpartition(": ")[2], []).append(row)
    found = []
    for comparison, rows in cases.items():
        if not any("target" in row for row in rows):
            continue
        each = []
        for row in rows:
            case = row["what"].rpartition(": ")[0]
            target = f" (≤ {row['target']:.2f}{'' if row['met'] else ', **missed**'})" if "target" in row else ""
            near = "target" in row and not row["met"] and f"{row['ratio']:.2f}" == f"{row['target']:.2f}"
            each.append(f"{case + ' ' if case else ''}**{row['ratio']:.{3 if near else 2}f}**{target}")
        found.append(f"| {result['claim']} | {TITLES[result['claim']]} | {comparison} | {'; '.join(each)} |")
    return found


def table(results: list[dict[str, Any]]) -> str:
    """All claims, in their order, and on which machine."""
    ordered = sorted(results, key=lambda r: int(r["claim"][1:]))
    lines = ["| | what | ratio of | medians (target) |", "|---|---|---|---|"]
    for result in ordered:
        lines += lines_of(result)
    machines = sorted({machine_of(r["machine"]) for r in ordered})
    return "\n".join([*lines, "", *(f"{m}." for m in machines)]) + "\n"


def machine_of(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    clock = "" if machine["clock"] == "perf_counter" else f", {machine['clock']}"
    return f"{machine['processor']}, {machine['threads']} threads{clock}, Python {machine['python']}, {versions}"


def read() -> list[dict[str, Any]]:
    """The results that are there."""
    return [
        json.loads((RESULTS / f"{claim}.json").read_text()) for claim in TITLES if (RESULTS / f"{claim}.json").is_file()
    ]


def quoted(readme: str) -> str:
    """What stands between the marks."""
    return readme.partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    """Write the table and quote it."""
    text = table(read())
    FILE.write_text(text)
    readme = README.read_text()
    before, found, rest = readme.partition(BEGIN)
    if found:
        README.write_text(before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    write()
