"""One layer, one batch, many adapters: five ways to add their changes to the base's product (docs/decisions/023).

segments: one operation, each segment's two thin products in turn. stacked: the same, the factors of equal segments side by
side in two batched products, as `select.is_stacked` rules. swept: one compiled sweep, as `grouped.is_swept` rules. loop: the
bare products of the segments, no bookkeeping. mask: all factors side by side, every row times all of them, and what is not
the row's own set to zero (which a server could only do with adapters that it has checked for NaN; that check is not counted).

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
from deltaw.ops import grouped, select
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
"""out, in, tokens, adapters; each has as many tokens, or in `UNEQUAL` cases the first ones fewer than the last."""
UNEQUAL = ((384, 384, 2048, 8), (1536, 384, 2048, 8), (1024, 1024, 512, 32))


def ways(out: int, columns: int, tokens: int, adapters: int, equal: bool) -> dict[str, Callable[[], Tensor]]:
    """The contenders; all but the base give the same y."""
    x, weight, bias = torch.randn(tokens, columns), torch.randn(out, columns) / columns**0.5, torch.randn(out)
    factors = [LowRank(torch.randn(RANK, columns), torch.randn(out, RANK) / 16, 2.0) for _ in range(adapters)]
    ends = [round(tokens * ((i / adapters) if equal else (i / adapters) ** 1.5)) for i in range(adapters + 1)]
    segments = [Segment(start, stop, (f,)) for start, stop, f in zip(ends, ends[1:], factors)]
    owner = torch.bucketize(torch.arange(tokens), torch.tensor(ends[1:]), right=True)
    own = torch.arange(adapters).repeat_interleave(RANK) == owner[:, None]
    rules = select.SHORT, grouped.is_swept

    def one_operation(limit: int, swept: bool) -> Tensor:
        select.SHORT, grouped.is_swept = limit, rules[1] if swept else lambda *_: False
        y = grouped_linear(x, weight, bias, segments, training=False)
        select.SHORT, grouped.is_swept = rules
        return y

    def loop() -> Tensor:
        y = F.linear(x, weight, bias)
        for start, stop, (f,) in segments:
            y[start:stop].addmm_(F.linear(x[start:stop], f.A), f.B.t(), alpha=f.scale)
        return y

    def mask() -> Tensor:
        y = F.linear(x, weight, bias)
        h = F.linear(x, torch.cat([f.A for f in factors])).where(own, 0.0)
        return y.addmm_(h, torch.cat([f.B.t() for f in factors]), alpha=2.0)

    return {
        "base": lambda: F.linear(x, weight, bias),
        "segments": lambda: one_operation(-1, swept=False),
        "stacked": lambda: one_operation(rules[0], swept=False),
        "swept": lambda: one_operation(rules[0], swept=True),
        "loop": loop,
        "mask": mask,
    }


def main(rounds: int = 60) -> None:
    print("| out x in, tokens, adapters | base (us) | segments | stacked | swept | loop | mask |\n|---|---|---|---|---|---|---|")
    for case, equal in [*((c, True) for c in CASES), *((c, False) for c in UNEQUAL)]:
        torch.manual_seed(SEED)
        found = ways(*case, equal)
        with torch.no_grad():
            expected = found["loop"]()
            for name in ("segments", "stacked", "swept", "mask"):
                torch.testing.assert_close(found[name](), expected, rtol=1e-4, atol=1e-4)
            times = {name: statistics.median(t) for name, t in alternate(found, rounds, warmup=3).items()}
        cells = [f"{times[name] / times['base']:.2f}" for name in ("segments", "stacked", "swept", "loop", "mask")]
        out, columns, tokens, adapters = case
        label = f"{out} x {columns}, {tokens}, {adapters}" + ("" if equal else " unequal")
        print(f"| {label} | {1e6 * times['base']:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
