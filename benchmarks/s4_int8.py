"""S4 and S5: the int8 base / PEFT's LoRA and / full fine-tuning, without dropout and with 0.05.

The int8 base is not the same function, so gradients are compared by direction: their cosine with the exact ones is
asserted and recorded.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import methods
from benchmarks.measure import alternate, medians, ratio, record, row
from benchmarks.workloads import all_workloads


def cosine(one: methods.Contender, other: methods.Contender) -> float:
    """Cosine between the gradients of all factors."""
    ours, exact = one.gradients()[1], other.gradients()[1]
    a, b = (torch.cat([g[name].flatten() for name in sorted(exact)]) for g in (ours, exact))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def main(rounds: int = 9) -> None:
    rows4: list[dict[str, Any]] = []
    rows5: list[dict[str, Any]] = []
    times = {}
    for work in all_workloads():
        ours, theirs = methods.deltaw(work, int8=True), methods.peft(work)
        near = cosine(ours, theirs)
        assert near > 0.98, f"{work.name}: the int8 base turns the gradient too far: cosine {near:.4f}"
        contenders = {
            "deltaw": ours,
            "peft": theirs,
            "deltaw dropout": methods.deltaw(work, int8=True, dropout=0.05),
            "peft dropout": methods.peft(work, dropout=0.05),
            "full": methods.full(work),
        }
        # the first calls look at how exact the 8-bit products are: at calls 1, 2 and 4, then 8
        t = alternate({name: c.step for name, c in contenders.items()}, rounds, warmup=4)
        times[work.name] = medians(t)
        cos = {"gradient_cosine": round(near, 5)}
        rows4.append(row(f"{work.name}: int8 deltaw / PEFT", ratio(t, "deltaw", "peft"), 0.60, **cos))
        rows4.append(row(f"{work.name}: int8 .05 deltaw / PEFT", ratio(t, "deltaw dropout", "peft dropout"), 0.42))
        rows5.append(row(f"{work.name}: int8 deltaw / full", ratio(t, "deltaw", "full"), 0.55))
        rows5.append(row(f"{work.name}: int8 .05 deltaw / full", ratio(t, "deltaw dropout", "full"), 0.55))
    record("S4", rows4, milliseconds=times)
    record("S5", rows5, milliseconds=times)


if __name__ == "__main__":
    main()
