"""A backward that cannot be differentiated again, and says so.

torch's own `once_differentiable` says so only where the incoming gradient needs one itself. In the gradient penalty of a
loss that is linear in the layer's output it does not, and what the penalty owes to A and B would be missing silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "second derivatives: the adapted linear's hand-written backward cannot be differentiated again (gradient penalties, "
    "create_graph=True); take them with torch.func (torch.func.grad inside of the loss, torch.func.hessian), where it is "
    "made of torch's own operations"
)

Gradients = tuple[Any, ...]


class Refused(torch.autograd.Function):
    """Gradients as they are, which depend on `reasons` in a way that is not told."""

    @staticmethod
    def forward(ctx: Any, found: Gradients, *reasons: Tensor | None) -> Gradients:
        """(gradients), what they depend on -> the same gradients."""
        return tuple(None if t is None else t.view_as(t) for t in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(MESSAGE)


def once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """`backward(ctx, *grads)` without a graph; what it gives raises RuntimeError if it is differentiated."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        refused: Gradients = Refused.apply(found, *grads, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return refused

    return wrapped
