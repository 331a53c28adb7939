"""An adapter of a 7-billion-parameter model, analysed and combined from its factors.

    python -m benchmarks.analysis_7b

Llama-2-7B's shapes (32 blocks, seven projections each), LoRA of rank 16 with random factors: what the time depends on.
No weight of that model is needed, and no matrix of its size is formed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch

import deltaw as dw
from benchmarks.measure import record
from deltaw.analysis.findings import analyze

HIDDEN, MIDDLE, BLOCKS, RANK = 4096, 11008, 32, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
"""Projection -> (out, in)."""


def adapter(seed: int) -> dw.Adapter:
    g = torch.Generator().manual_seed(seed)
    changes = {}
    for block in range(BLOCKS):
        for name, (out, columns) in SHAPES.items():
            A, B = torch.randn(RANK, columns, generator=g), torch.randn(out, RANK, generator=g)
            changes[f"model.layers.{block}.{name}.weight"] = dw.Change(
                dw.LoRA(rank=RANK), {"A": A, "B": B}, "linear", (out, columns)
            )
    return dw.Adapter(changes)


def main() -> None:
    """Time each verb once after a warm-up on one block, and write results/analysis-7b.json."""
    a, b = adapter(1), adapter(2)
    few = dw.Adapter({k: c for k, c in a.changes.items() if ".layers.0." in k})
    ways: dict[str, Callable[[dw.Adapter, dw.Adapter], Any]] = {
        "spectrum": lambda x, y: dw.spectrum(x),
        "similarity, input side": lambda x, y: dw.similarity(x, y),
        "analyze, two adapters": lambda x, y: analyze({"a": x, "b": y}),
        "combine, cat": lambda x, y: dw.combine([x, y], [0.6, -0.4]),
        "combine, svd to rank 16": lambda x, y: dw.combine([x, y], [0.6, -0.4], how="svd", rank=RANK),
        "combine, linear": lambda x, y: dw.combine([x, y], [0.6, 0.4], how="linear"),
        "combine, slerp": lambda x, y: dw.combine([x, y], [0.6, 0.4], how="slerp"),
    }
    rows = []
    for what, run in ways.items():
        run(few, few)
        wall, cpu = time.perf_counter(), time.process_time()
        run(a, b)
        used = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        rows.append({"what": what, "ratio": used["cpu_seconds"], **{k: round(v, 2) for k, v in used.items()}})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record("analysis-7b", rows, unit="ratio is CPU seconds", weights=len(a.changes), rank=RANK, peak_gib=round(peak, 2))


if __name__ == "__main__":
    main()
