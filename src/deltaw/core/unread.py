"""A tensor whose values nobody may read: code that gets on without them is thereby known to need its facts alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

FACTS = ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad")
"""What may be asked of an unread tensor."""


class Read(Exception):
    """The values of an unread tensor were asked for."""


class Unread(Tensor):
    """A tensor that gives its `FACTS` only."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(getattr(func, "__self__", None), "__name__", None) not in FACTS:  # a property's `__get__`
            raise Read
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def unread(tensor: Tensor) -> Unread:
    """The same tensor, unread."""
    return tensor.detach().as_subclass(Unread)


def stand_in(shape: tuple[int, ...], like: Tensor) -> Unread:
    """An unread tensor of that shape, in the precision and on the device of `like`, without memory."""
    return unread(like.new_empty(()).expand(shape))
