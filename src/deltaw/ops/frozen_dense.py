"""The linear layer that nobody trains, beside adapted ones: its products by the faster library, nothing saved but W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.matmul import by_onednn, linear, transformed
from deltaw.ops.terms import flat


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, moved: Callable[[], bool]) -> Tensor:
    """`F.linear` with a W and b that nobody trains: ∂x, and y too if `moved()`, by the faster library (matmul.py)."""
    if (
        not isinstance(x, Tensor)  # a tracer's stand-in
        or not by_onednn(flat(x), weight)
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.is_autocast_enabled(x.device.type)
        or transformed()
    ):
        return F.linear(x, weight, bias)
    y: Tensor = FrozenDense.apply(moved(), x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class FrozenDense(torch.autograd.Function):
    """x Wᵀ + b of a frozen W, of which backward needs nothing but W."""

    @staticmethod
    def forward(ctx: Any, moved: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.save_for_backward(weight)
        if not moved:
            return F.linear(x, weight, bias)
        return linear(flat(x), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """(..., out) -> (..., in)."""
        (weight,), g = ctx.saved_tensors, grads[0]
        if torch.is_grad_enabled():  # to be differentiated again
            return None, g @ weight, None, None
        return None, linear(flat(g), weight.t()).view(*g.shape[:-1], weight.shape[1]), None, None
