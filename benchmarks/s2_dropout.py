"""S2: the same step with dropout 0.05, where PEFT on a CPU is slower than full fine-tuning."""

from __future__ import annotations

from typing import Any

from benchmarks import methods
from benchmarks.measure import alternate, medians, ratio, record, row
from benchmarks.workloads import all_workloads


def main(rounds: int = 7) -> None:
    rows: list[dict[str, Any]] = []
    times = {}
    for work in all_workloads():
        contenders = {
            "deltaw": methods.deltaw(work, dropout=0.05),
            "peft": methods.peft(work, dropout=0.05),
            "full": methods.full(work),
        }
        t = alternate({name: c.step for name, c in contenders.items()}, rounds)
        times[work.name] = medians(t)
        rows.append(row(f"{work.name}: deltaw / PEFT, dropout .05", ratio(t, "deltaw", "peft"), 0.60))
        rows.append(row(f"{work.name}: deltaw / full, dropout .05", ratio(t, "deltaw", "full")))
        rows.append(row(f"{work.name}: PEFT / full, dropout .05", ratio(t, "peft", "full")))
    record("S2", rows, milliseconds=times)


if __name__ == "__main__":
    main()
