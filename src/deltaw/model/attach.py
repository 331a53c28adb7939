"""Attach, install and detach: adapters come to a model and leave it, and nothing else of it changes.

Everything is checked before anything changes: first a plan (which parameter of which module gets which variant), then
the deltas, and only then the model.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import ALIGNMENT, Adapter, Change, join_key
from deltaw.core.host import Host
from deltaw.core.part import parameter_of
from deltaw.core.variant import Delta, Dense, Site, Variant
from deltaw.errors import AdapterError, ConfigError, ModelError, NameTaken, NonFinite
from deltaw.model import state, targeting
from deltaw.model.changing import changing
from deltaw.model.fit import fitted
from deltaw.model.one_roster import one_roster, outside_contexts
from deltaw.model.placing import forget, place
from deltaw.model.plan import planned
from deltaw.model.planned import Planned

NAME = re.compile(r"[A-Za-z0-9_\-]+")
CHECKED_AT_ONCE = 2**24
"""Up to so many values in all, the targeted weights are checked to be finite at attach; larger ones where they are read anyway."""


@changing
def attach(
    model: nn.Module,
    variants: Variant | Mapping[targeting.Target, Variant],
    targets: Any = None,
    *,
    train: str | Sequence[str] = (),
    exclude: Any = (),
    layers: Sequence[int] | range | None = None,
    name: str = "default",
    freeze: bool = True,
    active: bool = True,
) -> nn.Module:
    """Give every layer that `targets` names a trainable change, freeze the rest, and return `model` (changed in place).

    variants: a variant, or the general form {target: variant}, each target with its own (then without `targets`).
    targets: dotted suffix, regex, module class, predicate `(path, module) -> bool`, a list of these, or "all-linear"
        (the default: every linear layer but the output head).
    train: modules (or single parameters) trained in full, by exact dotted suffix: each adapter keeps its own copy.
    exclude: targets to leave out. layers: only blocks with these indices (the first number in a path).
    name: the adapter's name. active: whether it speaks from now on (alone), as after `use`.
    freeze: no base parameter requires a gradient any more, and running statistics stand still; `detach` restores both.

    The weights that change are checked to be finite, if they are small or are read anyway; large ones at save and merge.

    Raises:
        TargetError: a target matches no layer, or one that cannot be adapted.
        NameTaken: the model has an adapter of that name.
        ConfigError: two targets want the same layer, or an option is wrong.
        NonFinite: a targeted weight holds NaN or infinity.
        ModelError: changes are merged into the weights, the model is scripted, traced or sharded already, or it is a part
            of an adapted model (or shares layers with one).
    If anything is wrong, the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach takes a torch.nn.Module; found {type(model).__name__}")
    layout = state.Layout(model)
    checked_name(layout, name)
    state.unmerged_in(layout.rosters(), "attach")
    plan = planned(layout, pairs(variants, targets), train, exclude, layers)
    check_finite(plan)
    shared: dict[str, Any] = {}
    deltas = [(item, item.variant.create(item.site_seen(), shared)) for item in plan]
    place(layout, deltas, name, {"matched": matched(plan)}, started, freeze=freeze, active=active)
    return model


def checked_name(layout: state.Layout, name: str) -> None:
    """Refuse a name that is taken or that cannot be one, and a model that takes no more adapters."""
    layout.unsharded("give the model another adapter")
    layout.ready("give the model an adapter")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"name={name!r}: an adapter's name has letters, digits, '_' and '-' only")
    if any(name in roster.names for roster in layout.rosters()):
        raise NameTaken(
            f"the model has an adapter {name!r} already: choose another name=, or dw.detach(model, {name!r}) first"
        )


def pairs(
    variants: Variant | Mapping[targeting.Target, Variant], chosen: Any
) -> list[tuple[targeting.Target, Variant]]:
    """Both forms of `attach` as a list of (target, variant)."""
    if isinstance(variants, Variant):
        return [(t, variants) for t in targeting.as_targets(targeting.ALL_LINEAR if chosen is None else chosen)]
    if not isinstance(variants, Mapping):
        raise ConfigError(
            "attach takes a variant such as dw.LoRA(rank=8), or {target: variant}; found "
            + (f"the class {variants.__name__}" if isinstance(variants, type) else type(variants).__name__)
        )
    if chosen is not None:
        raise ConfigError("attach(model, {target: variant}) names its targets in the mapping: leave `targets` out")
    if not variants:
        raise ConfigError("attach(model, {}) adapts nothing: give at least one {target: variant}")
    for target, variant in variants.items():
        if not isinstance(variant, Variant):
            raise ConfigError(f"{targeting.describe(target)}: {variant!r} is no variant such as dw.LoRA(rank=8)")
    return [(targeting.as_targets(t)[0], v) for t, v in variants.items()]


def matched(plan: list[Planned]) -> dict[str, int]:
    """How many modules each pattern matched, in the order of the patterns; `summary` tells it."""
    paths: dict[str, set[str]] = {}
    for item in plan:
        paths.setdefault(item.pattern, set()).add(item.path)
    return {pattern: len(found) for pattern, found in paths.items()}


def started(item: Planned, delta: Delta, host: Host) -> None:
    """Set a fresh delta's tensors that depend on the weight."""
    if not item.stored.is_meta:
        delta.start(
            host.frozen_matrix(item.site) if not item.variant.any_shape else Dense(host.stored_parameter(item.site))
        )


def check_finite(plan: list[Planned]) -> None:
    """Refuse weights that are NaN or infinite, if they are few enough to be read now."""
    stored = [(item, item.stored) for item in plan]
    weights = [(i, w) for i, w in stored if w.is_floating_point() and not w.is_meta and w.dtype.itemsize > 1]
    if sum([weight.numel() for _, weight in weights]) > CHECKED_AT_ONCE:
        return
    for item, weight in weights:
        total = weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        if not math.isfinite(float(total)) and not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFinite(
                f"base weight {item.key!r} holds {bad} values that are NaN or infinite: reload the base model"
            )


@changing
def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take adapter `name`, or all of them, out of `model`: classes, module tree and `requires_grad` become what they were.

    Raises:
        UnknownName: there is no such adapter.
        ModelError: changes are merged into the weights (unmerge first; after `merge(keep=None)` it is allowed), the
            adapters also change layers outside of `model`, or the calling thread is inside of `use`, `disabled` or `rows`.
    """
    layout = state.Layout(model)
    layout.unsharded("detach")
    rosters = layout.rosters()
    for roster in rosters:
        if roster.merged is not None and not roster.merged.final:
            raise ModelError(
                "cannot detach while changes are merged: dw.unmerge(model) first, or merge with keep=None to keep them for good"
            )
    if name is not None:
        state.known_in(rosters, layout.root, name)
    outside_contexts(rosters, "detach an adapter")
    roster = one_roster(layout, "detach")
    for each in list(roster.names) if name is None else [name]:
        forget(layout, roster, each)
    return model


# ---- adapters as values


def get(model: nn.Module, name: str = "default") -> Adapter:
    """The adapter `name` of `model` as a value: its tensors are detached copies.

    Of a sharded model (FSDP2, DTensor) they are gathered: every process must call it.

    Raises:
        UnknownName: there is no such adapter.
    """
    layout = state.Layout(model)
    state.known_in(layout.rosters(), layout.root, name)
    hosts = layout.hosts()
    changes = {}
    followers: dict[tuple[int, str], tuple[str, ...]] = {}
    for path, host in hosts:
        for site, (owner, theirs) in host.adapters.tied.get(name, {}).items():
            followers[id(owner), theirs] = (*followers.get((id(owner), theirs), ()), join_key(path, site))
    notes: dict[str, Any] = {}
    for path, host in hosts:
        notes = host.roster.notes.get(name, notes)
        for site, delta in host.deltas(name).items():
            variant, tensors = delta.kept()
            copies = {k: state.whole(t).clone() for k, t in tensors.items()}
            shape = tuple(host.stored_parameter(site).shape)
            key = join_key(path, site)
            changes[key] = Change(
                variant, copies, host.listed_as(), shape, followers.get((id(host), parameter_of(site)), ())
            )
    return Adapter(changes, notes.get("base", {}), notes.get("extra", {}))


def installed(
    layout: state.Layout,
    adapter: Adapter,
    name: str,
    *,
    active: bool,
    trainable: bool,
    freeze: bool = True,
    adopt: bool = False,
) -> bool:
    """Give the model of `layout` an adapter that exists already, as `name`. adopt: its tensors are for this model alone.

    Returns whether the model took them as they are, instead of copies.

    Raises:
        AdapterError: a change names no parameter of this model, or has another shape; all of them are listed.
        NameTaken, ConfigError, ModelError: as `attach`.
    """
    checked_name(layout, name)
    state.unmerged_in(layout.rosters(), "load an adapter")
    deltas, adopted = loaded(fitted(layout, adapter), adapter, trainable, adopt)
    notes = {"base": dict(adapter.base), "extra": dict(adapter.extra)}
    place(layout, deltas, name, notes, prepared, freeze=freeze, active=active)
    return adopted


def prepared(item: Planned, delta: Delta, host: Host) -> None:
    """Let a loaded delta cache what its forward needs of the weight."""
    if not item.stored.is_meta and not item.variant.any_shape:
        delta.prepare(host.frozen_matrix(item.site))


def loaded(
    plan: Sequence[Planned], adapter: Adapter, trainable: bool, adopt: bool = False
) -> tuple[list[tuple[Planned, Delta]], bool]:
    """The deltas that hold the adapter's tensors (copies, in the site's dtype and on its device).

    Nothing is initialised only to be written over: the deltas are made without memory, and take the copies.
    adopt: they take the tensors themselves, if all of them can be taken so; whether they did is what is returned beside.
    """
    shared: dict[str, Any] = {}
    sites = [item.site_seen() for item in plan]
    changes = [adapter.changes[item.key].tensors for item in plan]
    adopted = adopt and adoptable([(t, s) for s, tensors in zip(sites, changes) for t in tensors.values()])
    found = []
    for item, site, tensors in zip(plan, sites, changes):
        delta = item.variant.create(without_memory(site), shared)
        try:
            delta.hold({k: t.detach() if adopted else copied(t, site) for k, t in tensors.items()}, trainable)
        except AdapterError as error:
            raise AdapterError(f"{item.key!r}: {error}") from None
        delta.site = site
        found.append((item, delta))
    return found, adopted


@functools.lru_cache(maxsize=256)
def without_memory(site: Site) -> Site:
    """The same site on the meta device."""
    return replace(site, device=torch.device("meta"))


def copied(tensor: Tensor, site: Site) -> Tensor:
    """A copy in the site's dtype, on its device."""
    return tensor.detach().to(site.device, site.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def adoptable(wanted: Sequence[tuple[Tensor, Site]]) -> bool:
    """Whether tensors are each in its site's dtype, on its device, aligned as torch's own, and all apart from each other."""
    return len({t.data_ptr() for t, _ in wanted}) == len(wanted) and all(
        (t.dtype == site.dtype or not t.is_floating_point())
        and t.device == site.device
        and t.is_contiguous()
        and t.data_ptr() % ALIGNMENT == 0
        for t, site in wanted
    )
