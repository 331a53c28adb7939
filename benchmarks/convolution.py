"""The rule of `ops/select.py` for convolutions: W' = W + sBA against its factors, by the weight's numbers and the output's places.

One layer, forward and backward, rank 8, through deltaw's own host. `python -m benchmarks.convolution` prints a table.
"""

from __future__ import annotations

import torch
from torch import nn

import deltaw as dw
from benchmarks.measure import SEED, alternate, ratio
from deltaw.ops import select

SHAPES = ((16, 32, 1), (64, 64, 1), (64, 256, 1), (64, 64, 3), (512, 128, 1), (256, 256, 1), (128, 128, 3))
"""in, out, kernel."""
SIDES = (4, 8, 16, 32, 64)
"""Of a square image."""


def step(layer: nn.Module, x: torch.Tensor, limit: int) -> None:
    """Forward and backward with the rule's limit set."""
    select.KERNEL = limit
    layer(x).sum().backward()
    layer.zero_grad()
    x.grad = None


def main(rounds: int = 40) -> None:
    print("| in, out, kernel | numbers | " + " | ".join(f"{side}x{side}" for side in SIDES) + " |")
    print("|---" * (len(SIDES) + 2) + "|")
    for inputs, outputs, kernel in SHAPES:
        cells = []
        for side in SIDES:
            torch.manual_seed(SEED)
            model = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
            dw.attach(model, dw.LoRA(rank=8), targets=["0"])
            x = torch.randn(1, inputs, side, side, requires_grad=True)
            times = alternate(
                {
                    "changed": lambda m=model, x=x: step(m, x, 1 << 62),
                    "factors": lambda m=model, x=x: step(m, x, -1),
                },
                rounds,
            )
            cells.append(f"{ratio(times, 'changed', 'factors')['ratio']:.2f}")
        numbers = inputs * outputs * kernel**2
        print(f"| {inputs}, {outputs}, {kernel} | {numbers:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
