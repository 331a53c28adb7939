"""WHERE a change applies: a `Host` is the layer itself, its class changed to a subclass, its deltas in one child module.

Nothing moves: `isinstance(layer, nn.Linear)`, `layer.weight`, hooks, references and the base's `state_dict` names stay
as they were, and `release` changes the class back. A layer file (layers/) subclasses Host and says which parameters
are sites, how each is an (out, in) matrix, and how the layer computes with changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltaw.core.bare import Bare
from deltaw.core.beside import own_class, plain_again
from deltaw.core.dropped import dropped
from deltaw.core.frozen import FrozenWeight, foreign_dense
from deltaw.core.host_class import blank, bound_again, host_class
from deltaw.core.part import parameter_of, part, placed, placed_rows, rows_of
from deltaw.core.roster import Active, Roster
from deltaw.core.variant import Delta, Dense, FrozenMatrix

CHILD = "adapters"
FORMS = "forms"
"""Child modules that a host has beside the layer's own: its adapters, and frozen weights kept in another form."""


class Example(NamedTuple):
    """An awkward instance of a layer, for the laws: how to build it, and a call, `layer(*args(dtype), **kwargs)`."""

    label: str
    layer: Callable[[], nn.Module]
    args: Callable[[torch.dtype], tuple[Any, ...]]
    kwargs: Mapping[str, Any] = {}


class Adapters(Bare):
    """The child module of a host: adapter name -> `Changes`.

    tied: adapter name -> site -> (host, site) of another layer that has the very same parameter and holds its change.
    """

    _modules: dict[str, Changes]  # type: ignore[assignment]
    tied: dict[str, dict[str, tuple[Host, str]]]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["tied"] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._modules


class Changes(Bare):
    """What one adapter changes in one layer: site name -> `Delta`."""

    _modules: dict[str, Delta]  # type: ignore[assignment]


class Forms(nn.Module):
    """The child module of a host with quantised weights: parameter name -> `FrozenWeight`."""

    _modules: dict[str, FrozenWeight]  # type: ignore[assignment]


class Spoken(NamedTuple):
    """A delta that speaks now, its weight, and the host and site in whose matrix form it is a change."""

    delta: Delta
    weight: float
    host: Host
    site: str


class Host(nn.Module):
    """An adapted layer. Subclasses are mixed in front of the layer's own class: `class LinearHost(Host, nn.Linear)`."""

    family: ClassVar[str]
    """The layer family's name in files and tables."""
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer classes that this host adapts, their subclasses too (see `accepts_class`). (): any layer may be one of its kind."""
    base_class: ClassVar[type[nn.Module]]
    """The class that the layer had before."""
    host: ClassVar[type[Host]]
    """The layer family's class, of which this host's own class is made (see `host_class`)."""
    full_only: ClassVar[bool] = False
    """True for the host of last resort, which takes whole layers only for variants that suit a parameter of any shape."""
    watches: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer classes that read the weights of layers inside them: one with a changed layer inside becomes this host."""
    children_too: ClassVar[tuple[str, ...]] = ()
    """Child layers that a target means as well when it names the layer (MultiheadAttention's out_proj)."""
    lookup: ClassVar[bool] = False
    """True if the layer looks up columns of its matrix, so that factors had better start the other way round."""
    beneath: ClassVar[bool] = False
    """True to mix this host in behind the layer's class: the layer's own forward runs, and its `super().forward` is ours."""

    foreign: ClassVar[bool] = False
    """True for layers whose weight another library keeps in a form of its own (see `core.frozen.foreign_dense`)."""
    takes_forms: ClassVar[bool] = False
    """True if the forward computes with a frozen weight that is kept in another form (`form`)."""

    adapters: Adapters
    roster: Roster

    # ---- what a layer file fills in

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        """Whether `accepts` is to be asked of layers of class `kind`; called once for a class. Default: as `adapts` says."""
        return not cls.adapts or issubclass(kind, cls.adapts)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Whether this host computes exactly what `layer` does. Default: `layer`'s class is in `adapts` or inherits its forward."""
        return isinstance(layer, cls.adapts) and own_class(layer).forward in [
            a.forward for a in cls.adapts if isinstance(layer, a)
        ]

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """Site name -> (out, in) of the matrices that variants may change. Default: none."""
        return {}

    @classmethod
    def main_sites(cls, layer: nn.Module) -> tuple[str, ...]:
        """The sites that a target means when it names the layer. Default: all of them."""
        return tuple(cls.sites(layer))

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Why a layer that `accepts` took cannot be adapted after all, or None. Asked at attach and load only."""
        return None

    @classmethod
    def reads_class(cls, kind: type[nn.Module]) -> bool:
        """Whether `reads` is to be asked of layers of class `kind`; called once for a class. Default: one of `watches`."""
        return issubclass(kind, cls.watches)

    @classmethod
    def reads(cls, layer: nn.Module) -> bool:
        """Whether `layer` reads weights of a host inside it without calling that. Default: one of `watches` with a host inside."""
        return isinstance(layer, cls.watches) and any(isinstance(m, Host) for m in layer.modules() if m is not layer)

    def read_inside(self) -> Iterable[Host]:
        """The changed layers inside whose weights this layer's own code reads, and which then take effect. Default: none."""
        return ()

    @classmethod
    def methods(cls, base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        """Methods of the layer's class `base`, besides its forward, that an adapted layer has in another way. Default: none."""
        return {}

    def bias_of(self, site: str) -> tuple[str, slice | None] | None:
        """The bias (and which rows of it) that is added to what a weight's site computes, or None. Default: "bias"."""
        return ("bias", None) if site == "weight" and self._parameters.get("bias") is not None else None

    @classmethod
    def biases(cls, layer: nn.Module) -> tuple[str, ...]:
        """The bias parameters that a variant with `bias=True` trains with the layer. Default: "bias", if there is one."""
        return ("bias",) if layer._parameters.get("bias") is not None else ()

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Awkward instances for the laws (dilated, grouped, padded, no bias, rank above a dimension ...)."""
        return ()

    def listed_as(self) -> str:
        """The layer family under which files and tables list this layer. Default: `family`."""
        return self.family

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
        plain_again(layer)
        base = type(layer)
        object.__setattr__(layer, "roster", roster)
        roster.touched.add(layer)
        layer._modules[CHILD] = Adapters()
        object.__setattr__(layer, "__class__", host_class(cls, base))
        bound_again(layer, base)
        return layer  # type: ignore[return-value]

    def has_moved(self) -> bool:
        """Whether a low-rank change that speaks here has left its start, B = 0. Rows with their own adapters do not ask."""
        if getattr(self.roster.local, "rows", None) is not None:
            return False
        factors = [getattr(s.delta, "B", None) for s in self.speaking("weight")]
        return any(isinstance(B, Tensor) and bool(B.any()) for B in factors)

    def release_layer(self) -> None:
        """Change the class back. All deltas must have been removed."""
        del self._modules[CHILD]
        del self.__dict__["roster"]
        ours = type(self)
        object.__setattr__(self, "__class__", self.base_class)
        bound_again(self, ours)

    def add_delta(self, name: str, site: str, delta: Delta) -> None:
        """Give this layer's `site` the change `delta` under the adapter `name`."""
        adapters = self.adapters._modules
        changes = adapters.get(name)
        if changes is None:
            changes = adapters[name] = Changes()
        changes._modules[site] = delta
        if delta.training != self.training:
            delta.train(self.training)

    def remove_adapter(self, name: str) -> None:
        """Take adapter `name` out of this layer, if it is there."""
        self.adapters._modules.pop(name, None)
        self.adapters.tied.pop(name, None)

    def deltas(self, name: str) -> dict[str, Delta]:
        """Site -> delta of adapter `name` (empty if it does not change this layer)."""
        changes = self.adapters._modules.get(name)
        return {} if changes is None else dict(changes._modules)

    def stored_parameter(self, site: str) -> Tensor:
        """The frozen parameter (or buffer) that a site is or is a part of, whole, in stored shape."""
        name = parameter_of(site)
        found: Tensor | None = self._parameters.get(name)
        if found is None:
            form = self.form_of(name)
            if form is None and name not in self._buffers:
                return getattr(self, name)  # type: ignore[no-any-return]  # computed from others, as weight_norm does
            found = self._buffers[name] if form is None else self.from_matrix(name, form.dense())
        assert found is not None
        if self.foreign:
            dense = foreign_dense(self, found)
            found = found if dense is None else dense
        return found

    def form_of(self, name: str) -> FrozenWeight | None:
        """The form in which a frozen parameter is kept, or None if it is simply there."""
        forms = self._modules.get(FORMS)
        return None if forms is None else forms._modules.get(name)  # type: ignore[return-value]

    def held_names(self) -> tuple[str, ...]:
        """The names of the frozen parameters that are kept in another form."""
        forms = self._modules.get(FORMS)
        return () if forms is None else tuple(forms._modules)

    def hold_form(self, name: str, form: FrozenWeight | None, parameter: nn.Parameter | None = None) -> None:
        """Keep the frozen parameter `name` as `form`; or, without one, have it as the plain `parameter` again.

        Over a form, `layer.<name>` is the kept tensor (codes), not the weight that it stands for.
        """
        forms = self._modules.get(FORMS)
        if form is not None:
            self._parameters.pop(name, None)
            if forms is None:
                forms = Forms()
                self._modules[FORMS] = forms
            forms._modules[name] = form
        else:
            if forms is not None:
                forms._modules.pop(name, None)
                if not forms._modules:
                    del self._modules[FORMS]
            order = ("weight", "bias")  # as torch.nn registers them
            self._parameters[name] = parameter
            if set(self._parameters) == set(order):
                self._parameters.update({n: self._parameters.pop(n) for n in order})
        held = self._modules.get(FORMS)
        self.__class__ = host_class(self.host, self.base_class, () if held is None else tuple(held._modules))

    def matrix_of(self, site: str, stored: Tensor) -> Tensor:
        """The (out, in) matrix of a site, which may be a part, from the whole stored parameter."""
        return part(self.to_matrix(parameter_of(site), stored), rows_of(site))

    def frozen_matrix(self, site: str) -> FrozenMatrix:
        """The frozen weight of a site as a matrix."""
        form = self.form_of(site)
        return form if form is not None else self.dense_matrix(site)

    def dense_matrix(self, site: str) -> Dense:
        """The same of a weight that is kept in no form."""
        stored = self.stored_parameter(site)
        return Dense(self.matrix_of(site, stored), stored)

    # ---- what the forwards use

    def grouped_call(self, x: Tensor, groups: Sequence[tuple[Active, int, int]]) -> Tensor | None:
        """The layer's output where rows start..stop of x have their own adapters, as one operation.

        None (the default) if there is none: the call is then made group by group.
        """
        return None

    def speaking(self, site: str, active: Active | None = None) -> list[Spoken]:
        """The deltas that change the parameter `site` now (or where `active` speak): its own, those of its parts, those of
        a layer tied to it."""
        found = []
        adapters = self.adapters
        for name, weight in self.roster.active() if active is None else active:
            changes = adapters._modules.get(name)
            if changes is not None:
                for own, delta in changes._modules.items():
                    if parameter_of(own) == site:
                        found.append(Spoken(delta, weight, self, own))
            tied = adapters.tied.get(name)
            if tied is not None and site in tied:
                owner, theirs = tied[site]
                for own, delta in owner.adapters._modules[name]._modules.items():
                    if parameter_of(own) == theirs:
                        found.append(Spoken(delta, weight, owner, own))
        return found

    def active_deltas(self, site: str) -> list[tuple[Delta, float]]:
        """The deltas that change the parameter `site` now, with their weights."""
        return [(s.delta, s.weight) for s in self.speaking(site)]

    def active_sites(self, active: Active | None = None) -> set[str]:
        """The parameters that some active adapter (or one of `active`) changes."""
        sites: set[str] = set()
        adapters = self.adapters
        for name, _ in self.roster.active() if active is None else active:
            changes = adapters._modules.get(name)
            if changes is not None:
                for own, delta in changes._modules.items():
                    sites.add(parameter_of(own))
                    if delta.changes_bias:
                        fed = self.bias_of(parameter_of(own))
                        if fed is not None:
                            sites.add(fed[0])
            tied = adapters.tied.get(name)
            if tied is not None:
                sites.update(tied)
        return sites

    def changed(self, site: str, dtype: torch.dtype | None = None, dropout: bool = False) -> Tensor:
        """The parameter with all active changes, in stored shape: W + Σ weight · ΔW(W); for a bias, b + Σ weight · Δb(b).

        The sum is formed in the deltas' precision and rounded once to the stored dtype (or to `dtype`, if that is wider).
        dropout: apply the variants' dropout, one mask for the whole call (see `change`).
        """
        spoken = self.speaking(site)
        feeding = self.feeding(site)
        stored = self.stored_parameter(site)
        wanted = stored.dtype if dtype is None else torch.promote_types(dtype, stored.dtype)
        if not spoken and not feeding:
            return stored
        if not torch.compiler.is_compiling():
            self.roster.uncalled.discard(id(self))  # read, which is as good as called
        if len(spoken) == 1 and not feeding and spoken[0].weight == 1.0 and spoken[0].delta.variant.any_shape:
            return spoken[0].delta.new_weight(stored.to(wanted))
        summed = functools.reduce(torch.promote_types, (s.delta.site.dtype for s in (*spoken, *feeding)), wanted)
        wide = stored.to(summed)
        total = wide
        for s in spoken:
            change = s.host.change_of(s.site, s.delta, wide, dropout)
            total = total + (change if s.weight == 1.0 else s.weight * change)
        for s in feeding:
            rows = rows_of(s.site)
            change_of_bias = s.delta.delta_bias(wide if rows is None else wide[rows])
            if change_of_bias is not None:
                total = total + s.weight * placed_rows(change_of_bias, rows, wide.shape[0])
        return total.to(wanted)

    def change_of(self, site: str, delta: Delta, stored: Tensor, dropout: bool = False) -> Tensor:
        """ΔW of the whole stored parameter that `delta`, at `site`, makes.

        dropout: for layers that run with W + ΔW, the variant's dropout zeroes features (columns of A, or rows of B with
        dropout_at="output") for the whole call: the same mask for every row and time step (arXiv:1512.05287).
        """
        if delta.variant.any_shape:
            return delta.delta_weight(stored)
        name, rows = parameter_of(site), rows_of(site)
        whole = self.to_matrix(name, stored)
        weight = part(whole, rows)
        change = dropped(delta, weight) if dropout else None
        if change is None:
            change = delta.delta_weight(weight)
        return self.from_matrix(name, placed(change, rows, whole.shape[-2]))

    def feeding(self, bias_site: str) -> list[Spoken]:
        """The active deltas of weights that change this bias as well (IA3), each with the part of it as its site."""
        found = []
        for name, weight in self.roster.active():
            changes = self.adapters._modules.get(name)
            if changes is None:
                continue
            for own, delta in changes._modules.items():
                if delta.changes_bias:
                    fed = self.bias_of(parameter_of(own))
                    if fed is not None and fed[0] == bias_site:
                        start = 0 if fed[1] is None else fed[1].start
                        rows = rows_of(own) or fed[1]
                        if rows is not None and rows is not fed[1]:
                            rows = slice(start + rows.start, start + rows.stop)
                        end = "" if rows is None else f"[{rows.start}:{rows.stop}]"
                        found.append(Spoken(delta, weight, self, bias_site + end))
        return found

    def apart(self, site: str) -> Tensor:
        """Σ weight · ΔW of a site in stored shape, apart from the frozen weight: zero to the bit where nothing changes."""
        changed = self.changed(site)
        frozen = self.from_matrix(site, self.frozen_matrix(site).dense())
        return changed - frozen.to(changed.dtype)

    def changed_bias(self, bias_site: str = "bias") -> Tensor | None:
        """The bias with all active changes: its own deltas and those that come with the weight's (IA3)."""
        return None if self._parameters.get(bias_site) is None else self.changed(bias_site)

    # ---- copies and pickles: a dynamic class is rebuilt from its two parts

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        forms = self._modules.get(FORMS)
        held = () if forms is None else tuple(forms._modules)
        return blank, (self.host, self.base_class, held), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        base_state = getattr(self.base_class, "__getstate__", None)
        state = base_state(self) if base_state not in (None, object.__getstate__) else self.__dict__
        return dict(state)


def parameter_names(layer: nn.Module) -> list[str]:
    """The names of a layer's own parameters, those that are kept in another form included."""
    forms = layer._modules.get(FORMS) if isinstance(layer, Host) else None
    held = [] if forms is None else list(forms._modules)
    return held + [name for name, parameter in layer._parameters.items() if parameter is not None]
