"""One layer, one batch, many adapters: four ways to add their changes to the base's product (docs/decisions/023).

segments: one operation, each segment's two thin products in turn. stacked: the same, the factors of equal segments side by
side in two batched products, as `select.is_stacked` rules. loop: the bare products of the segments, no bookkeeping. mask:
all factors side by side, every row times all of them, and what is not the row's own set to zero (which a server could only
do with adapters that it has checked for NaN; that check is not counted).

`python -m benchmarks.segments` prints a table: microseconds of the base, and the others over it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import SEED, alternate
from deltaw.core.variant import LowRank
from deltaw.ops import select
from deltaw.ops.grouped import Segment, grouped_linear

RANK = 8
CASES = (
    (384, 384, 32, 8),
    (384, 384, 64, 64),
    (1024, 1024, 32, 16),
    (1024, 1024, 64, 64),
    (2048, 2048, 64, 64),
    (384, 384, 2048, 8),
    (1536, 384, 2048, 8),
    (384, 1536, 2048, 8),
    (1024, 1024, 2048, 8),
    (1024, 1024, 512, 32),
)
"""out, in, tokens, adapters; each has as many tokens."""


def ways(out: int, columns: int, tokens: int, adapters: int) -> dict[str, Callable[[], Tensor]]:
    """The contenders; all but the base give the same y."""
    x, weight, bias = torch.randn(tokens, columns), torch.randn(out, columns) / columns**0.5, torch.randn(out)
    factors = [LowRank(torch.randn(RANK, columns), torch.randn(out, RANK) / 16, 2.0) for _ in range(adapters)]
    each = tokens // adapters
    segments = [Segment(i * each, (i + 1) * each, (f,)) for i, f in enumerate(factors)]
    own = torch.arange(adapters).repeat_interleave(RANK) == torch.arange(tokens)[:, None] // each

    def one_operation(limit: int) -> Tensor:
        select.SHORT = limit
        return grouped_linear(x, weight, bias, segments, training=False)

    def loop() -> Tensor:
        y = F.linear(x, weight, bias)
        for start, stop, (f,) in segments:
            y[start:stop].addmm_(F.linear(x[start:stop], f.A), f.B.t(), alpha=f.scale)
        return y

    def mask() -> Tensor:
        y = F.linear(x, weight, bias)
        h = F.linear(x, torch.cat([f.A for f in factors])).where(own, 0.0)
        return y.addmm_(h, torch.cat([f.B.t() for f in factors]), alpha=2.0)

    short = select.SHORT
    return {
        "base": lambda: F.linear(x, weight, bias),
        "segments": lambda: one_operation(-1),
        "stacked": lambda: one_operation(short),
        "loop": loop,
        "mask": mask,
    }


def main(rounds: int = 60) -> None:
    print("| out x in, tokens, adapters | base (us) | segments | stacked | loop | mask |\n|---|---|---|---|---|---|")
    for case in CASES:
        torch.manual_seed(SEED)
        found = ways(*case)
        with torch.no_grad():
            expected = found["loop"]()
            for name in ("segments", "stacked", "mask"):
                torch.testing.assert_close(found[name](), expected, rtol=1e-4, atol=1e-4)
            times = {name: statistics.median(t) for name, t in alternate(found, rounds, warmup=3).items()}
        cells = [f"{times[name] / times['base']:.2f}" for name in ("segments", "stacked", "loop", "mask")]
        out, columns, tokens, adapters = case
        print(f"| {out} x {columns}, {tokens}, {adapters} | {1e6 * times['base']:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
