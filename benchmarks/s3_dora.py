"""S3: DoRA / PEFT's DoRA, without dropout and with 0.05."""

from __future__ import annotations

from typing import Any

from benchmarks import methods
from benchmarks.measure import alternate, medians, ratio, record, row
from benchmarks.workloads import all_workloads


def main(rounds: int = 7) -> None:
    rows: list[dict[str, Any]] = []
    times = {}
    for work in all_workloads():
        ours, theirs = methods.deltaw(work, dora=True), methods.peft(work, dora=True)
        methods.agree(ours, theirs)
        contenders = {
            "deltaw": ours,
            "peft": theirs,
            "deltaw dropout": methods.deltaw(work, dora=True, dropout=0.05),
            "peft dropout": methods.peft(work, dora=True, dropout=0.05),
            "full": methods.full(work),
        }
        t = alternate({name: c.step for name, c in contenders.items()}, rounds)
        times[work.name] = medians(t)
        rows.append(row(f"{work.name}: DoRA deltaw / PEFT", ratio(t, "deltaw", "peft"), 0.72))
        rows.append(row(f"{work.name}: DoRA .05 deltaw / PEFT", ratio(t, "deltaw dropout", "peft dropout"), 0.45))
        rows.append(row(f"{work.name}: DoRA deltaw / full", ratio(t, "deltaw", "full")))
        rows.append(row(f"{work.name}: DoRA PEFT / full", ratio(t, "peft", "full")))
        rows.append(row(f"{work.name}: DoRA .05 PEFT / full", ratio(t, "peft dropout", "full")))
    record("S3", rows, milliseconds=times)


if __name__ == "__main__":
    main()
