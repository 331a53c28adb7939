"""An adapter's own products and the 8-bit passes, by torch's operations and as compiled sweeps (docs/decisions/028).

`python -m benchmarks.sweeps` prints a table: microseconds of torch's operations, and the sweep's time over theirs. Before
each call 128 MiB are written, so that x and g come from memory, as in a training step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import SEED, alternate
from deltaw.ops import cpu_thin, int8, steps
from deltaw.ops.compiled import library
from deltaw.ops.dora import row_norms_of
from deltaw.ops.dropout import Mask
from deltaw.ops.recompute import recipe_of
from deltaw.ops.steps import Change, Plain

RANK = 8
SHAPES = (
    (1024, 384, 384),
    (1024, 384, 1536),
    (1024, 1536, 384),
    (3200, 384, 1536),
    (512, 576, 1536),
    (1024, 768, 3072),
)
"""Rows, in, out."""

Work = Callable[[Any], object]


def works(rows: int, columns: int, out: int) -> dict[str, Work]:
    """What is timed, each for a `Sweep` or a `Plain`."""
    x, g, y, z = (torch.randn(rows, k) for k in (columns, out, out, columns))
    A, B, bias, scales = torch.randn(RANK, columns), torch.randn(out, RANK), torch.randn(out), torch.rand(rows, 1)
    h = torch.randn(rows, RANK)
    mask = Mask(torch.tensor(SEED, dtype=torch.int32), rows, columns, 0.05, torch.float32)

    def forward(dropped: Mask | None) -> Work:
        return lambda sweep: sweep.shrink(x, A, dropped)

    def backward(dropped: Mask | None, gain: bool = False, producer: Callable[[Tensor], Tensor] | None = None) -> Work:
        found = None if producer is None else recipe_of(producer(x.clone().requires_grad_()))

        def work(sweep: Any) -> list[Tensor]:
            rows: Any = x
            if found is not None:
                recipe, kept = found
                compiled = isinstance(sweep, cpu_thin.Sweep)
                rows = sweep.make(recipe.describe(*kept)) if compiled else recipe.make(*kept)
            u, own = sweep.shrink(g, B.t()), sweep.shrink(rows, A, dropped)
            products = [u, sweep.outer(own, g, 2.0, transposed=True), sweep.outer(u, rows, 2.0, dropped)]
            return [*products, sweep.dots(g, y, bias)] if gain else products

        return work

    W, squares = torch.randn(out, columns), torch.rand(out)
    return {
        "h": forward(None),
        "h, dropout": forward(mask),
        "backward": backward(None),
        "backward, dropout": backward(mask),
        "backward, gain": backward(None, True),
        "backward, x = gelu(z)": backward(None, producer=functional.gelu),
        "backward, x = LayerNorm(z)": backward(None, producer=lambda z: functional.layer_norm(z, z.shape[1:], A[0], A[1])),
        "DoRA's norms": lambda _: row_norms_of(W, squares, A, B, 2.0),
        "into ∂x, dropout": lambda sweep: sweep.expand_(z, h, A, 1e-9, mask),
        "codes": lambda sweep: int8.quantize_rows(x),
        "8 bit into y": lambda sweep: steps.finish_(y, scales, None, bias, [Change(h, B.t(), 1e-9, None)]),
    }


def main() -> None:
    compiled = library()
    if isinstance(compiled, str):
        raise SystemExit(f"no compiled operations here: {compiled}")
    torch.manual_seed(SEED)
    cold = torch.zeros(1 << 25)
    names = list(works(*SHAPES[0]))
    print(f"| rows, in, out | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for shape in SHAPES:
        cells = []
        for work in works(*shape).values():

            def run(kind: type, there: object, work: Work = work) -> None:
                cpu_thin.library = lambda: there  # type: ignore[assignment]
                sweep = kind()
                with torch.no_grad():
                    work(sweep)
                sweep.run()

            contenders: dict[str, Callable[[], object]] = {}
            for name, kind, there in (("torch", Plain, "not now"), ("sweep", cpu_thin.Sweep, compiled)):
                contenders[f"{name} cold"] = lambda: cold.add_(1)
                contenders[name] = lambda kind=kind, there=there: run(kind, there)
            times = alternate(contenders, 15, warmup=2)
            plain, ours = (statistics.median(times[name]) for name in ("torch", "sweep"))
            cells.append(f"{1e6 * plain:.0f}, {ours / plain:.2f}")
        print(f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
