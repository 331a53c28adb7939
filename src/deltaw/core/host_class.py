"""The class of an adapted layer, made once for each pair of a host and the layer's own class, and its forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaw.core.recall import in_backward, note_silent_call, recall, remember
from deltaw.ops.compact import hooks_in_force

if TYPE_CHECKING:
    from deltaw.core.host import Host


KEPT = ("forward", "_old_forward")
"""Where an instance may keep its class's forward: as its own, and accelerate's hooks, which look there at every call."""

_classes: dict[tuple[type[Host], type[nn.Module], tuple[str, ...]], type[Host]] = {}


def host_class(host: type[Host], base: type[nn.Module], held: tuple[str, ...] = ()) -> type[Host]:
    """The class of an adapted `base`: `host` mixed in front of it, named so that `print(model)` reads well.

    held: the parameters that are kept in another form; as attributes they give the kept tensor.
    """
    if (host, base, held) not in _classes:
        body = {"base_class": base, "host": host, "__module__": base.__module__, "forward": called(host, base)}
        body |= host.methods(base)
        body |= {name: property(functools.partial(_kept, name=name)) for name in held}
        parents = (base, host) if host.beneath else (host, base)
        _classes[host, base, held] = type(f"{base.__name__}Host", parents, body)
    return _classes[host, base, held]


def _kept(layer: Host, name: str) -> Tensor:
    form = layer.form_of(name)
    assert form is not None
    return form.codes


def called(host: type[Host], base: type[nn.Module]) -> Callable[..., Any]:
    """`host`'s forward with what holds for every call of every host: rows with their own adapters, and recomputation."""
    own = base.forward if host.beneath else host.forward
    names = {} if host.beneath else called_otherwise(base.forward, own)

    @functools.wraps(base.forward)
    def forward(self: Host, *args: Any, **kwargs: Any) -> Any:
        if kwargs and names:
            kwargs = {names.get(name, name): value for name, value in kwargs.items()}
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        try:
            roster, grad = self.roster, torch.is_grad_enabled()
        except AttributeError:  # released, and a wrapper of the instance has kept this forward
            return base.forward(self, *args, **kwargs)
        if roster.uncalled:
            roster.uncalled.discard(id(self))
        if in_backward() and not getattr(roster.local, "again", False):
            speaking = recall(roster)
            if speaking is not None:
                with roster.using(speaking, recalled=True):
                    return forward(self, *args, **kwargs)
        if not grad:
            note_silent_call(roster)
        since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        rows = getattr(roster.local, "rows", None)
        output = own(self, *args, **kwargs) if rows is None else rows.call(self, own, args, kwargs)
        if grad and hooks_in_force() is not None:  # as in a checkpointed part: only what runs again asks
            remember(roster, output, since)
        return output

    return forward


def called_otherwise(theirs: Callable[..., Any], ours: Callable[..., Any]) -> dict[str, str]:
    """The layer's names of arguments -> those of the host's forward at the same places, where they differ."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        places = [
            [p.name for p in inspect.signature(f).parameters.values() if p.kind in by_place] for f in (theirs, ours)
        ]
    except (TypeError, ValueError):  # no Python function
        return {}
    return {name: own for name, own in zip(*places) if name != own}


def bound_again(layer: nn.Module, before: type[nn.Module]) -> None:
    """Let the forwards that `layer` keeps, bound when its class was `before`, be those of its class of now."""
    for name in KEPT:
        if keeps(layer, name, before):
            layer.__dict__[name] = MethodType(type(layer).forward, layer)


def hidden(layer: nn.Module) -> bool:
    """Whether a forward of the instance's own runs in place of its class's, and never comes to that by what is kept."""
    return "forward" in layer.__dict__ and not any(keeps(layer, name, type(layer)) for name in KEPT)


def keeps(layer: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    """Whether `layer` keeps, as `name`, the forward of `kind`, bound to itself."""
    kept = layer.__dict__.get(name)
    return isinstance(kept, MethodType) and kept.__self__ is layer and kept.__func__ is kind.forward


def blank(host: type[Host], base: type[nn.Module], held: tuple[str, ...] = ()) -> nn.Module:
    """An adapted layer without its state, for copies and pickles."""
    cls = host_class(host, base, held)
    return cls.__new__(cls)
