"""Random starts: `Tensor.uniform_` and the compiled function that draws the same numbers (ops/uniform.py).

`python -m benchmarks.uniform` prints a table: microseconds of both for A (rank, in), and their ratio (docs/decisions/029).
"""

from __future__ import annotations

import torch

from benchmarks.measure import SEED, alternate, medians, ratio
from deltaw.ops.uniform import agrees, uniform_

SHAPES = ((2, 1024), (8, 384), (8, 1024), (8, 4096), (64, 4096))


def main() -> None:
    assert agrees(), "nothing compiled here"
    print("| A | torch, us | compiled, us | ratio (quartiles) |\n|---|---|---|---|")
    for shape in SHAPES:
        one, other = torch.empty(shape), torch.empty(shape)
        for a, draw in ((one, torch.Tensor.uniform_), (other, uniform_)):
            torch.manual_seed(SEED)
            draw(a, -0.1, 0.1)
        assert torch.equal(one, other)
        times = alternate({"torch": lambda: one.uniform_(-0.1, 0.1), "ours": lambda: uniform_(other, -0.1, 0.1)}, 501, 10)  # noqa: B023
        ms, r = medians(times), ratio(times, "ours", "torch")
        spread = f"{r['ratio']:.2f} ({r['quartile_low']:.2f}, {r['quartile_high']:.2f})"
        print(f"| {shape[0]} x {shape[1]} | {1e3 * ms['torch']:.1f} | {1e3 * ms['ours']:.1f} | {spread} |")


if __name__ == "__main__":
    main()
