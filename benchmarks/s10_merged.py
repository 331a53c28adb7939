"""S10: inference with merged weights / the base model: the same layers, the same time."""

from __future__ import annotations

from typing import Any

import torch

import deltaw as dw
from benchmarks import methods
from benchmarks.measure import alternate, medians, ratio, record, row
from benchmarks.workloads import minilm, whisper_tiny


def main(rounds: int = 15) -> None:
    rows: list[dict[str, Any]] = []
    times = {}
    for work in (whisper_tiny(), minilm()):
        base = work.build().eval()
        ours = methods.deltaw(work).model.eval()
        with torch.no_grad():
            before = work.loss(ours)
            dw.merge(ours)
            torch.testing.assert_close(work.loss(ours), before, rtol=1e-4, atol=1e-6)
            assert work.loss(base) != before, "the adapter changes nothing"
            steps = {
                "merged": lambda ours=ours, work=work: work.loss(ours),
                "base": lambda base=base, work=work: work.loss(base),
            }
            t = alternate(steps, rounds)
        times[work.name] = medians(t)
        rows.append(row(f"{work.name}: merged / base", ratio(t, "merged", "base"), 1.05))
    record("S10", rows, milliseconds=times)


if __name__ == "__main__":
    main()
