"""A step of torch's fused AdamW with its moments in one buffer (training/flat_state.py) and in tensors apart.

`python -m benchmarks.flat_state` prints a table: microseconds of both, and their ratio (docs/decisions/020). The parameters and
their gradients are those of rank 8 on all linear layers of each model; both give the same bits, which is asserted.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.measure import SEED, alternate, medians, ratio
from deltaw.training.flat_state import lay_flat

RANK = 8
BLOCK = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
MODELS = {
    "seed 000's perceptron": [(128, 784), (256, 128), (10, 256)],
    "whisper-tiny's encoder": BLOCK * 4,
    "MiniLM": BLOCK * 6,
    "SmolLM2-135M": [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30,
    "32 layers of 4096 x 4096, rank 64": [(4096, 4096)] * 32,
}
"""(out, in) of the layers."""


def contender(shapes: list[tuple[int, int]], rank: int, flat: bool) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(SEED)
    parameters = [nn.Parameter(torch.randn(s)) for out, columns in shapes for s in ((rank, columns), (out, rank))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    if flat:
        lay_flat(optimizer)
    return parameters, optimizer


def main() -> None:
    print("| adapter | tensors | apart, us | one buffer, us | ratio (quartiles) |\n|---|---|---|---|---|")
    for name, shapes in MODELS.items():
        rank = 64 if "64" in name else RANK
        (apart, one), (flat, other) = (contender(shapes, rank, f) for f in (False, True))
        times = alternate({"apart": one.step, "flat": other.step}, 301, warmup=10)
        assert all(torch.equal(a, b) for a, b in zip(apart, flat, strict=True))
        ms, r = medians(times), ratio(times, "flat", "apart")
        spread = f"{r['ratio']:.2f} ({r['quartile_low']:.2f}, {r['quartile_high']:.2f})"
        print(f"| {name} | {len(apart)} | {1e3 * ms['apart']:,.0f} | {1e3 * ms['flat']:,.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
