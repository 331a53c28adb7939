"""Dropout of a tensor of any shape whose mask is never stored: y = x ⊙ mask(seed), and dx = dy ⊙ mask(seed).

The mask is that of dropout.py over x's numbers in the order in which they lie in memory, a block at a time. torch's own
draws a random number per entry, which costs a CPU more than a thin convolution, and keeps the mask until backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.dropout import BLOCK, Mask, draw_seed
from deltaw.ops.leaves import as_views
from deltaw.ops.matmul import transformed


def seeded_dropout(x: Tensor, p: float) -> Tensor:
    """x with each entry zero with probability p, else divided by 1 - p. Elsewhere than on a CPU it is torch's own."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return F.dropout(x, p)
    y: Tensor = Masked.apply(*as_views((x, draw_seed(x.device))), p, torch.empty_like(x, device="meta").stride())  # type: ignore[no-untyped-call]
    return y


class Masked(torch.autograd.Function):
    """x ⊙ mask, laid out by `stride`, without gaps in memory. Linear in x: its derivative is itself, of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, stride: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.stride = p, stride
        y = torch.empty_strided(x.shape, stride, dtype=x.dtype)
        if x.stride() != stride:
            x = y.copy_(x)
        count = x.numel()
        mask = Mask(seed, -(-count // BLOCK), BLOCK, p, torch.promote_types(x.dtype, torch.float32))
        source, target = x.as_strided((count,), (1,)), y.as_strided((count,), (1,))
        for i in range(mask.count):
            part = slice(i * BLOCK, min(count, (i + 1) * BLOCK))
            torch.mul(source[part], mask.rows(slice(i, i + 1))[0, : part.stop - part.start], out=target[part])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (seed,) = ctx.saved_tensors
        return Masked.apply(grads[0], seed, ctx.p, ctx.stride), None, None, None  # type: ignore[no-untyped-call]
