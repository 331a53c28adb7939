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


def once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """`backward(ctx, *grads)` without a graph; what it gives raises RuntimeError if it is differentiated."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        refuse = torch._C._functions.DelayedError(MESSAGE.encode(), len(found))
        marked: Gradients = refuse(*[None if t is None else t.detach().requires_grad_() for t in found])  # type: ignore[arg-type]
        return marked

    return wrapped
