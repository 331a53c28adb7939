"""An nn.Module with nothing in it that nobody asked for: attaching makes three for each layer, and a model may carry thousands.

An nn.Module holds a dozen empty containers for hooks. A `Bare` makes each when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

STARTS = dict(nn.Module().__dict__)
ALWAYS = ("_parameters", "_buffers", "_modules")
"""What nn.Module itself looks for in `__dict__`."""
ASKED: dict[str, Callable[[], Any]] = {
    name: type(value) for name, value in STARTS.items() if name not in ALWAYS and hasattr(value, "copy")
}
"""Name -> the kind of container, made when asked for."""
PLAIN = {name: value for name, value in STARTS.items() if name not in ALWAYS and name not in ASKED}
"""Flags."""


class Bare(nn.Module):
    """A module of ours, without the general checks of `nn.Module.__init__`."""

    def __init__(self) -> None:
        self.__dict__.update(PLAIN, _parameters={}, _buffers={}, _modules={})

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters", ())
        if name in parameters:  # as nn.Module does, and first: a forward asks for these
            return parameters[name]
        kind = ASKED.get(name)
        return super().__getattr__(name) if kind is None else self.__dict__.setdefault(name, kind())
