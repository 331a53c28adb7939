"""WHERE a change applies: a `Host` is the layer itself, its class changed to a subclass, its deltas in one child module.

Nothing moves: `isinstance(layer, nn.Linear)`, `layer.weight`, hooks, references and the base's `state_dict` names stay
as they were, and `release` changes the class back. A layer file (layers/) subclasses Host and says which parameters
are sites, how each is an (out, in) matrix, and how the layer computes with changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltaw.core.recall import in_backward, note_silent_call, recall, remember
from deltaw.core.roster import Roster
from deltaw.core.variant import Delta, Dense, FrozenMatrix

CHILD = "adapters"


class Example(NamedTuple):
    """An awkward instance of a layer, for the laws: how to build it, and a call, `layer(*args(dtype), **kwargs)`."""

    label: str
    layer: Callable[[], nn.Module]
    args: Callable[[torch.dtype], tuple[Any, ...]]
    kwargs: Mapping[str, Any] = {}


class Adapters(nn.Module):
    """The child module of a host: adapter name -> `Changes`."""

    _modules: dict[str, Changes]  # type: ignore[assignment]

    def __contains__(self, name: str) -> bool:
        return name in self._modules


class Changes(nn.Module):
    """What one adapter changes in one layer: site name -> `Delta`."""

    _modules: dict[str, Delta]  # type: ignore[assignment]


class Host(nn.Module):
    """An adapted layer. Subclasses are mixed in front of the layer's own class: `class LinearHost(Host, nn.Linear)`."""

    family: ClassVar[str]
    """The layer family's name in files and tables."""
    adapts: ClassVar[tuple[type[nn.Module], ...]]
    """Layer classes that this host adapts (their subclasses too, if `accepts` agrees)."""
    base_class: ClassVar[type[nn.Module]]
    """The class that the layer had before."""
    host: ClassVar[type[Host]]
    """The layer family's class, of which this host's own class is made (see `host_class`)."""
    full_only: ClassVar[bool] = False
    """True for the host of last resort, which takes only variants that suit a parameter of any shape."""

    adapters: Adapters
    roster: Roster

    # ---- what a layer file fills in

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Whether this host computes exactly what `layer` does. Default: `layer`'s class is in `adapts` or inherits its forward."""
        return any(isinstance(layer, a) and type(layer).forward is a.forward for a in cls.adapts)

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """Site name -> (out, in) of the matrices that variants may change. Default: none."""
        return {}

    @classmethod
    def main_sites(cls, layer: nn.Module) -> tuple[str, ...]:
        """The sites that a target means when it names the layer. Default: all of them."""
        return tuple(cls.sites(layer))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Awkward instances for the laws (dilated, grouped, padded, no bias, rank above a dimension ...)."""
        return ()

    def to_matrix(self, site: str, stored: Tensor) -> Tensor:
        """Stored parameter -> (out, in) matrix, a view where possible."""
        return stored

    def from_matrix(self, site: str, matrix: Tensor) -> Tensor:
        """(out, in) matrix -> stored shape. The inverse of `to_matrix`."""
        return matrix

    # ---- what model/ uses

    @classmethod
    def of(cls, layer: nn.Module, roster: Roster) -> Self:
        """Turn `layer` into a host, in place. It computes exactly what it did until a delta is added."""
        base = type(layer)
        object.__setattr__(layer, "roster", roster)
        layer.add_module(CHILD, Adapters())
        layer.__class__ = host_class(cls, base)
        return layer  # type: ignore[return-value]

    def release(self) -> None:
        """Change the class back. All deltas must have been removed."""
        del self._modules[CHILD]
        del self.__dict__["roster"]
        self.__class__ = self.base_class  # type: ignore[assignment]

    def add(self, name: str, site: str, delta: Delta) -> None:
        """Give this layer's `site` the change `delta` under the adapter `name`."""
        changes = self.adapters._modules.get(name)
        if changes is None:
            changes = Changes()
            self.adapters._modules[name] = changes
        changes._modules[site] = delta.train(self.training)

    def remove(self, name: str) -> None:
        """Take adapter `name` out of this layer, if it is there."""
        self.adapters._modules.pop(name, None)

    def deltas(self, name: str) -> dict[str, Delta]:
        """Site -> delta of adapter `name` (empty if it does not change this layer)."""
        changes = self.adapters._modules.get(name)
        return {} if changes is None else dict(changes._modules)

    def parameter(self, site: str) -> Tensor:
        """The frozen parameter (or buffer) behind a site, in stored shape."""
        found: Tensor | None = self._parameters.get(site)
        if found is None:
            found = self._buffers[site]
        assert found is not None
        return found

    def frozen(self, site: str) -> FrozenMatrix:
        """The frozen weight of a site as a matrix."""
        return Dense(self.to_matrix(site, self.parameter(site)))

    # ---- what the forwards use

    def active(self, site: str) -> list[tuple[Delta, float]]:
        """The deltas of `site` that speak now, with their weights."""
        found = []
        for name, weight in self.roster.active():
            changes = self.adapters._modules.get(name)
            if changes is not None:
                delta = changes._modules.get(site)
                if delta is not None:
                    found.append((delta, weight))
        return found

    def active_sites(self) -> set[str]:
        """The sites that some active adapter changes."""
        sites: set[str] = set()
        for name, _ in self.roster.active():
            changes = self.adapters._modules.get(name)
            if changes is not None:
                sites.update(changes._modules)
        return sites

    def changed(self, site: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter with all active changes, in stored shape: W + Σ weight · ΔW(W).

        The sum is formed in the deltas' precision and rounded once to the stored dtype (or to `dtype`, if that is wider).
        """
        active = self.active(site)
        stored = self.parameter(site)
        wanted = stored.dtype if dtype is None else torch.promote_types(dtype, stored.dtype)
        if not active:
            return stored
        if len(active) == 1 and active[0][1] == 1.0 and active[0][0].variant.any_shape:
            return active[0][0].new_weight(stored.to(wanted))
        summed = functools.reduce(torch.promote_types, (d.site.dtype for d, _ in active), stored.dtype)
        wide = stored.to(summed)
        total = wide
        for delta, weight in active:
            if delta.variant.any_shape:
                change = delta.delta_weight(wide)
            else:
                change = self.from_matrix(site, delta.delta_weight(self.to_matrix(site, wide)))
            total = total + (change if weight == 1.0 else weight * change)
        return total.to(wanted)

    def changed_bias(self, weight_site: str = "weight", bias_site: str = "bias") -> Tensor | None:
        """The bias with all active changes: its own deltas and those that come with the weight's (IA3)."""
        if self._parameters.get(bias_site) is None:
            return None
        stored = self.parameter(bias_site)
        bias = self.changed(bias_site)
        for delta, weight in self.active(weight_site):
            change = delta.delta_bias(stored)
            if change is not None:
                bias = bias + weight * change.to(bias.dtype)
        return bias

    # ---- copies and pickles: a dynamic class is rebuilt from its two parts

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.host, self.base_class), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        base_state = getattr(self.base_class, "__getstate__", None)
        state = base_state(self) if base_state not in (None, object.__getstate__) else self.__dict__
        return dict(state)


def _blank(host: type[Host], base: type[nn.Module]) -> nn.Module:
    cls = host_class(host, base)
    return cls.__new__(cls)


def called(host: type[Host], base: type[nn.Module]) -> Callable[..., Any]:
    """`host`'s forward with what holds for every call of every host: rows with their own adapters, and recomputation."""
    own = host.forward

    @functools.wraps(base.forward)
    def forward(self: Host, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        roster, grad = self.roster, torch.is_grad_enabled()
        if grad and in_backward() and not getattr(roster.local, "again", False):
            speaking = recall(roster)
            if speaking is not None:
                with roster.using(speaking):
                    return forward(self, *args, **kwargs)
        if not grad:
            note_silent_call(roster)
        since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        rows = getattr(roster.local, "rows", None)
        output = own(self, *args, **kwargs) if rows is None else rows.call(self, own, args, kwargs)
        if grad:
            remember(roster, output, since)
        return output

    return forward


_classes: dict[tuple[type[Host], type[nn.Module]], type[Host]] = {}


def host_class(host: type[Host], base: type[nn.Module]) -> type[Host]:
    """The class of an adapted `base`: `host` mixed in front of it, named so that `print(model)` reads well."""
    if (host, base) not in _classes:
        body = {"base_class": base, "host": host, "__module__": base.__module__, "forward": called(host, base)}
        _classes[host, base] = type(f"{base.__name__}Host", (host, base), body)
    return _classes[host, base]


def shell(
    module: nn.Module,
    base: type[nn.Module],
    tensors: dict[str, Tensor | None],
    buffers: dict[str, Tensor | None] | None = None,
) -> nn.Module:
    """A shallow twin of `module`, of class `base`, whose own parameters (and buffers) are `tensors`: nothing shared is mutated.

    `base.forward(shell(...), x)` computes the layer with changed weights, safely in any number of threads.
    """
    twin = base.__new__(base)
    state = dict(module.__dict__)
    state["_parameters"] = {**module._parameters, **tensors}
    if buffers is not None:
        state["_buffers"] = {**module._buffers, **buffers}
    object.__setattr__(twin, "__dict__", state)
    return twin
