"""S1: a training step, exact fp32, rank 8 on all linears: deltaw / PEFT, beside full fine-tuning and the frozen floor."""

from __future__ import annotations

from typing import Any

from benchmarks import methods
from benchmarks.measure import alternate, medians, ratio, record, row
from benchmarks.workloads import all_workloads


def main(rounds: int = 9) -> None:
    rows: list[dict[str, Any]] = []
    times = {}
    for work in all_workloads():
        ours, theirs = methods.deltaw(work), methods.peft(work)
        methods.agree(ours, theirs)
        contenders = {"deltaw": ours, "peft": theirs, "full": methods.full(work), "floor": methods.floor(work)}
        t = alternate({name: c.step for name, c in contenders.items()}, rounds)
        times[work.name] = medians(t)
        target = max(0.85, 1.08 * ratio(t, "floor", "peft")["ratio"])
        rows.append(row(f"{work.name}: deltaw / PEFT", ratio(t, "deltaw", "peft"), target))
        rows.append(row(f"{work.name}: deltaw / full", ratio(t, "deltaw", "full")))
        rows.append(row(f"{work.name}: PEFT / full", ratio(t, "peft", "full")))
        rows.append(row(f"{work.name}: floor / PEFT", ratio(t, "floor", "peft")))
    record("S1", rows, milliseconds=times)


if __name__ == "__main__":
    main()
