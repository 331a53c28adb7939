"""A hand-written backward that can be differentiated again: what it gives is then taken from the plain twin.

Where nobody asks for derivatives of the derivatives, backward runs as it is written, without a graph. With
`create_graph=True` (gradient penalties, Hessians) the plain twin's value is computed from the saved tensors, and its
derivatives are torch's own, which can be differentiated as often as wished.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "second derivatives: the adapted linear did not keep its input here, as only B learns (create_graph=True); let A learn "
    "too, or take them with torch.func (torch.func.grad inside of the loss, torch.func.hessian)"
)

Gradients = tuple[Any, ...]

Twin = Callable[[Any, Sequence[Any]], tuple[Tensor, Sequence[Any]] | None]
"""ctx and its saved tensors -> y, made of them by differentiable operations, and the arguments of `forward` it was made of,
None for what is no tensor; or None where something was not saved."""


def twice(twin: Twin) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates `backward(ctx, saved, *grads)` of a function with one output; `saved` are ctx's tensors, which a checkpointed
    part gives out but once."""

    def decorated(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *grads: Tensor) -> Gradients:
            with_graph, saved = torch.is_grad_enabled() and not torch.compiler.is_compiling(), ctx.saved_tensors
            made = twin(ctx, saved) if with_graph else None
            if made is not None:
                return derivatives(*made, grads[0], ctx.needs_input_grad)
            with torch.no_grad():
                found = backward(ctx, saved, *grads)
            return Refused.apply(found, *grads, *saved) if with_graph else found  # type: ignore[no-any-return, no-untyped-call]

        return wrapped

    return decorated


def derivatives(y: Tensor, inputs: Sequence[Any], g: Tensor, needed: Sequence[bool]) -> Gradients:
    """The gradients of `inputs`, with a graph; None for those that need none."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def apart(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Every tensor as a view of itself: one that is given twice has two gradients."""
    return [None if t is None else t.view_as(t) for t in tensors]


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
