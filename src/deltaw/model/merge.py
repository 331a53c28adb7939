"""Merge: write W + ΔW into the weights, report what rounding did, and go back to the very bits.

A merged weight is a new tensor put in the place of the old one (`parameter.data`), which is kept, never recovered by
subtraction. So `unmerge` is exact in any dtype, and a base that must not be written to (a memory map) is not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from deltaw.core.adapter import join_key, split_key
from deltaw.core.frozen import FrozenWeight
from deltaw.core.host import Host, parameter_names
from deltaw.core.roster import Active
from deltaw.errors import ConfigError, ModelError, NonFinite
from deltaw.model import state
from deltaw.model.activate import Choice, chosen
from deltaw.model.changing import changing
from deltaw.model.one_roster import one_roster
from deltaw.model.originals import Keep, OriginalsFile
from deltaw.model.targeting import layers_of
from deltaw.model.ties import identity, others, refuse_one_sided, shared

Into = Literal["dequantized", "original"]
INTO: tuple[Into, ...] = ("dequantized", "original")


@dataclass(frozen=True)
class MergedWeight:
    """What merging did to one parameter.

    largest: largest |ΔW|. rounding: largest |stored - exact| of the merged weight; relative: ‖stored - exact‖ / ‖ΔW‖.
    unmoved: share of the entries with ΔW ≠ 0 whose stored value did not move.
    errors: for a weight kept in another form, `relative` for both targets, "dequantized" and "original".
    """

    key: str
    dtype: str
    largest: float
    rounding: float
    relative: float
    unmoved: float
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did, weight by weight; `kept_bytes` is the cost of the originals that are kept for `unmerge`."""

    names: tuple[str, ...]
    weights: tuple[MergedWeight, ...]
    kept_bytes: int

    def __str__(self) -> str:
        worst = max(self.weights, key=lambda w: w.relative)
        both = [w.errors for w in self.weights if w.errors]
        forms = "".join(
            f"; error of the change in quantised weights at most {max(e[into] for e in both):.1%} into={into!r}"
            for into in (INTO if both else ())
        )
        return (
            f"merged {', '.join(self.names)} into {len(self.weights)} weights; "
            f"largest change {max(w.largest for w in self.weights):.3g}, "
            f"rounding at most {max(w.rounding for w in self.weights):.3g}, "
            f"{worst.relative:.2%} of the change in {worst.key} ({worst.dtype}), "
            f"entries that did not move at most {max(w.unmoved for w in self.weights):.1%}; "
            f"originals kept: {self.kept_bytes / 2**20:.1f} MiB{forms}"
        )


@dataclass
class Merged:
    """What `unmerge` needs: the originals, in memory or in a file. Those kept in another form stay in memory: they are small."""

    names: tuple[str, ...]
    keep: Keep
    originals: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, FrozenWeight] = field(default_factory=dict)
    file: OriginalsFile | None = None

    @property
    def final(self) -> bool:
        """Whether there is no way back: the originals were not kept, or their file is gone."""
        return self.keep is None or (self.file is not None and not self.file.path.exists())


@dataclass
class Change:
    """One parameter to be merged: its name, a host that holds it, the new values, and the layers that share it."""

    key: str
    host: Host
    site: str
    new: Tensor
    again: FrozenWeight | None
    line: MergedWeight
    tied: list[tuple[str, nn.Module, str]]


@changing
def merge(model: nn.Module, names: Choice = None, keep: Keep = "memory", into: Into = "dequantized") -> MergeReport:
    """Write the changes of `names` (default: the active adapters) into the weights, rounding once to their dtype.

    keep: where the originals go for `unmerge`: "memory" (costs as much as the merged weights; the report says how
        much), "file" (a temporary safetensors file, gone with the model, with `unmerge` or with the process), or None
        (merged for good).
    into: for a quantised weight, the form of the result: "dequantized" or "original" (quantised again). The report
        holds the error of both.

    Raises:
        ModelError: something is merged already, no adapter speaks, or a weight is on the meta device.
        NonFinite: a weight or a change holds NaN or infinity.
        UnknownName: the model has no adapter of that name.
    If anything is wrong, nothing is merged.
    """
    if keep not in ("memory", "file", None):
        raise ConfigError(f"keep={keep!r} is not one of 'memory', 'file', None")
    if into not in INTO:
        raise ConfigError(f"into={into!r} is not one of 'dequantized', 'original'")
    layout = state.Layout(model)
    root, rosters = layout.root, layout.rosters()
    state.unmerged_in(rosters, "merge")
    if not rosters:
        raise ModelError("nothing to merge: the model carries no adapter")
    roster = one_roster(layout, "merge")
    active = roster.active() if names is None else chosen(root, names)
    if not active:
        raise ModelError("nothing to merge: no adapter is active; name one, dw.merge(model, 'name')")
    changes = list(changed_weights(root, active, into))
    if not changes:
        raise ModelError(f"nothing to merge: {[n for n, _ in active]} change no weight")

    merged = Merged(tuple(n for n, _ in active), keep)
    originals: dict[str, Tensor] = {}
    for change in changes:
        form = change.host.form_of(change.site)
        if form is not None:
            if keep is not None:
                merged.forms[change.key] = form
        else:
            originals[change.key] = change.host.stored_parameter(change.site).data
            for path, layer, site in change.tied:
                originals[join_key(path, site)] = stored(layer, site).data
    if keep == "file":
        apart = {k: t.clone(memory_format=torch.contiguous_format) for k, t in originals.items()}
        merged.file = OriginalsFile.of(apart)
    elif keep == "memory":
        merged.originals = originals
    for change in changes:
        write(change, into)
    roster.merged = merged
    cost = sum(c.new.numel() * c.new.element_size() for c in changes if c.key in originals) if keep == "memory" else 0
    return MergeReport(merged.names, tuple(c.line for c in changes), cost)


def write(change: Change, into: Into) -> None:
    """Put the new values into their place, and into those of all layers that share the parameter."""
    host, site = change.host, change.site
    form = host.form_of(site)
    if form is None:
        host.stored_parameter(site).data = change.new
        for _, layer, other in change.tied:
            stored(layer, other).data = change.new
    elif into == "original":
        assert change.again is not None
        change.again.record = replace(form.record, original=None, file=None)  # the original is not that of this weight
        host.hold_form(site, change.again)
    else:
        host.hold_form(site, None, nn.Parameter(change.new, False))


def changed_weights(model: nn.Module, active: Active, into: Into) -> Iterator[Change]:
    """Every parameter that the active adapters change, once, whatever the number of layers that share it."""
    ties = shared(state.parameters_of(layers_of(model)))
    refuse_one_sided(ties, active)
    hosts = list(state.hosts(model))
    seen: set[Hashable] = set()
    with torch.no_grad(), undropped(host for _, host in hosts):
        for path, host in hosts:
            with host.roster.using(active):
                for site in sorted(host.active_sites()):
                    form = host.form_of(site)
                    one = identity(host.stored_parameter(site)) if form is None else id(form)
                    if one not in seen:
                        seen.add(one)
                        key = join_key(path, site)
                        new, again, line = merged_weight(key, host, site, into)
                        tied = others(ties, host, site) if form is None else []
                        yield Change(key, host, site, new, again, line, tied)


def stored(layer: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a layer."""
    found = layer._parameters.get(name)
    return found if found is not None else layer._buffers[name]  # type: ignore[return-value]


@contextmanager
def undropped(hosts: Iterable[Host]) -> Iterator[None]:
    """Within the context the changes of `hosts` are whole, whatever their mode: no rank or module dropout is merged."""
    before = {m: m.training for host in hosts for m in host.adapters.modules()}
    for module in before:
        module.training = False
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def merged_weight(key: str, host: Host, site: str, into: Into) -> tuple[Tensor, FrozenWeight | None, MergedWeight]:
    """The new values of one site, the same in the form in which it is kept (if it is), and its line of the report."""
    here = host.stored_parameter(site)
    if site not in parameter_names(host) and site not in host._buffers:
        raise ModelError(
            f"cannot merge into {key!r}: since the adapter was attached it is computed from other parameters at every call "
            "(pruning, weight_norm, a parametrization); make it a plain weight first (torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if host.foreign and site == "weight":
        raise ModelError(
            f"cannot merge into {key!r}: another library keeps it quantised; load the base model in 16 or 32 bit, load "
            "the adapter there, and merge"
        )
    if here.is_meta:
        raise ModelError(f"cannot merge into {key!r}: the base is on the meta device; load its weights first")
    if not here.is_floating_point():
        new = host.changed(site)
        return new.clone(), None, MergedWeight(key, str(here.dtype).removeprefix("torch."), 0.0, 0.0, 0.0, 0.0)
    if not bool(torch.isfinite(here).all()):
        raise NonFinite(f"cannot merge: base weight {key!r} holds NaN or infinity; reload the base model")
    exact = host.changed(site, dtype=torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise NonFinite(f"cannot merge: the change of {key!r} holds NaN or infinity; the adapter is damaged")
    form = host.form_of(site)
    laid_as = exact.contiguous() if form is not None else here  # as the layer's own lies in memory
    new = torch.empty_like(laid_as, dtype=here.dtype, requires_grad=False).copy_(exact)
    again = None if form is None else form.form.keep(host.to_matrix(site, new))
    delta = exact - here.to(exact.dtype)
    size = float(torch.linalg.vector_norm(delta))

    def relative(result: Tensor) -> float:
        return float(torch.linalg.vector_norm(result.to(exact.dtype) - exact)) / size if size else 0.0

    errors: dict[str, float] = {}
    result = new
    if again is not None:
        requantised = host.from_matrix(site, again.dense())
        errors = {"dequantized": relative(new), "original": relative(requantised)}
        result = requantised if into == "original" else new
    wanted = delta != 0
    line = MergedWeight(
        key,
        repr(again.form) if again is not None and into == "original" else str(here.dtype).removeprefix("torch."),
        float(delta.abs().max()) if delta.numel() else 0.0,
        float((result.to(exact.dtype) - exact).abs().max()) if delta.numel() else 0.0,
        relative(result),
        float(((result == here) & wanted).sum()) / max(1, int(wanted.sum())),
        errors,
    )
    return new, again, line


@changing
def unmerge(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit; after a `model.to(dtype)` rounded to the model's dtype of now.

    Raises:
        ModelError: nothing is merged, it was merged with keep=None, or the file with the originals is gone.
    """
    layout = state.Layout(model)
    if all(roster.merged is None for roster in layout.rosters()):
        raise ModelError("nothing is merged")
    roster = one_roster(layout, "unmerge")
    merged: Merged = roster.merged
    if merged.keep is None:
        raise ModelError("merged with keep=None: the originals are gone; load the base model again")
    otherwise = "load the base model again, or dw.detach(model) to keep what is merged for good"
    originals = merged.originals if merged.file is None else merged.file.read(otherwise)
    layers = layout.layers
    strange = [key for key in {**originals, **merged.forms} if not isinstance(layers.get(split_key(key)[0]), Host)]
    if strange:
        raise ModelError(f"{strange[0]!r} is not in this module: call dw.unmerge on the one that was given to dw.merge")
    for key, original in originals.items():
        path, site = split_key(key)
        here = stored(layers[path], site)
        here.data = original.to(here.device, here.dtype)
    for key, form in merged.forms.items():
        path, site = split_key(key)
        host = layers[path]
        assert isinstance(host, Host)
        here = host.stored_parameter(site)
        host.hold_form(site, form.to(here.device, here.dtype))
    roster.merged = None
    return model


@contextmanager
def merged(model: nn.Module, names: Choice = None) -> Iterator[MergeReport]:
    """Within the context, the changes of `names` (default: the active adapters) are merged into the weights."""
    report = merge(model, names)
    try:
        yield report
    finally:
        if any(roster.merged is not None for roster in state.rosters(model)):
            unmerge(model)
