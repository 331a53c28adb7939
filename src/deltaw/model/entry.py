"""The entry of a model: where a call can be split before any layer sees it.

`model.forward` is shadowed by an instance attribute while some thread is inside of `rows`; the class, and other threads,
see nothing of it.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deltaw.core.roster import ByRow, Roster
from deltaw.errors import ModelError
from deltaw.model import state


class AtEntry(ByRow):
    """Speaks until the model's entry is reached, and takes the call over there."""

    @abstractmethod
    def run(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's call; `plain` is its own forward."""


class Entry:
    """Stands in for `model.forward` while some thread is inside of `rows`; other threads pass through it."""

    def __init__(self, model: nn.Module, roster: Roster) -> None:
        self.model = model
        self.before: Callable[..., Any] | None = model.__dict__.get("forward")
        self.users = 0
        plain = model.forward
        self.__wrapped__ = plain
        self.roster = roster

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = getattr(self.roster.local, "rows", None)
        if isinstance(request, AtEntry):
            return request.run(self.__wrapped__, args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> Any:
        raise ModelError("a model cannot be copied or pickled inside of dw.rows: leave the context first")


_LOCK = threading.Lock()


@contextmanager
def entered(place: nn.Module, roster: Roster) -> Iterator[None]:
    """An `Entry` in front of `place`'s forward, shared by all threads that are inside."""
    with _LOCK:
        entry = place.__dict__.get("forward")
        if not isinstance(entry, Entry):
            entry = Entry(place, roster)
            place.__dict__["forward"] = entry
        entry.users += 1
    try:
        yield
    finally:
        with _LOCK:
            entry.users -= 1
            if not entry.users:
                if entry.before is None:
                    del place.__dict__["forward"]
                else:
                    place.__dict__["forward"] = entry.before


def entrance(model: nn.Module) -> nn.Module:
    """The module whose calls are split: the compiled one if there is one, else the model behind its wrappers."""
    while model is not state.unwrap(model) and not is_compiled(model):
        model = model._modules["module"]  # type: ignore[assignment]
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module run compiled code."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
