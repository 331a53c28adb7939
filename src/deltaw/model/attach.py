"""Attach, install and detach: adapters come to a model and leave it, and nothing else of it changes.

Everything is checked before anything changes: first a plan (which parameter of which module gets which variant), then
the deltas, and only then the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change, join_key
from deltaw.core.host import FORMS, Host
from deltaw.core.part import parameter_of
from deltaw.core.roster import Roster
from deltaw.core.variant import Delta, Dense, Site, Variant
from deltaw.errors import AdapterError, ConfigError, ModelError, NameTaken, NonFinite, TargetError
from deltaw.model import first_call, state, targeting
from deltaw.model.plan import Planned, fitted, full_host, planned
from deltaw.model.quantizer_gate import close_gate, open_gate

NAME = re.compile(r"[A-Za-z0-9_\-]+")
CHECKED_AT_ONCE = 2**24
"""Up to so many values in all, the targeted weights are checked to be finite at attach; larger ones where they are read anyway."""


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
        ModelError: changes are merged into the weights, or the model is scripted, traced or sharded already.
    If anything is wrong, the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach takes a torch.nn.Module; found {type(model).__name__}")
    root = state.unwrap(model)
    checked_name(root, name)
    state.unmerged(root, "attach")
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "cannot attach inside of torch.inference_mode(): what is made there can never be trained; leave it first"
        )
    plan = planned(root, pairs(variants, targets), train, exclude, layers)
    place(root, plan, name, freeze=freeze, active=active)
    return model


def checked_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or that cannot be one, and a model that takes no more adapters."""
    state.unsharded(model, "give the model another adapter")
    state.ready(model, "give the model an adapter")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"name={name!r}: an adapter's name has letters, digits, '_' and '-' only")
    if name in state.names(model):
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
            f"attach takes a variant such as dw.LoRA(rank=8), or {{target: variant}}; found {type(variants).__name__}"
        )
    if chosen is not None:
        raise ConfigError("attach(model, {target: variant}) names its targets in the mapping: leave `targets` out")
    if not variants:
        raise ConfigError("attach(model, {}) adapts nothing: give at least one {target: variant}")
    for target, variant in variants.items():
        if not isinstance(variant, Variant):
            raise ConfigError(f"{targeting.describe(target)}: {variant!r} is no variant such as dw.LoRA(rank=8)")
    return [(targeting.as_targets(t)[0], v) for t, v in variants.items()]


# ---- from a plan to a changed model


def place(model: nn.Module, plan: list[Planned], name: str, *, freeze: bool, active: bool) -> None:
    """Carry out a plan with freshly started deltas."""
    check_finite(plan)
    shared: dict[str, Any] = {}
    deltas = [(item, item.variant.create(item.site_seen(), shared)) for item in plan]
    roster = one_roster(model)
    try:
        for item, delta in deltas:
            host = item.layer if isinstance(item.layer, Host) else item.host.of(item.layer, roster)
            if not item.stored.is_meta:
                delta.start(host.frozen(item.site) if not item.variant.any_shape else Dense(host.parameter(item.site)))
            host.add(name, item.site, delta)
            tie(item, host, name, roster)
        enter(model, roster, name, freeze=freeze, active=active)
        roster.notes[name] = {"matched": matched(plan)}
    except BaseException:
        forget(model, roster, name)
        raise


def matched(plan: list[Planned]) -> dict[str, int]:
    """How many modules each pattern matched, in the order of the patterns; `summary` tells it."""
    paths: dict[str, set[str]] = {}
    for item in plan:
        paths.setdefault(item.pattern, set()).add(item.path)
    return {pattern: len(found) for pattern, found in paths.items()}


def tie(item: Planned, host: Host, name: str, roster: Roster) -> None:
    """Let the other layers that have the same parameter follow its change."""
    site = parameter_of(item.site)
    for _, layer, other in item.tied:
        follower = layer if isinstance(layer, Host) else full_host(layer).of(layer, roster)
        follower.adapters.tied.setdefault(name, {})[other] = (host, site)


def one_roster(model: nn.Module) -> Roster:
    """The roster of this model; parts that were adapted on their own come under one."""
    found = state.rosters(model)
    if not found:
        return Roster()
    first, *others = found
    for other in others:
        first.names += [n for n in other.names if n not in first.names]
        first.frozen = {**other.frozen, **first.frozen}
        first.notes = {**other.notes, **first.notes}
    if others:
        for _, host in state.hosts(model):
            object.__setattr__(host, "roster", first)
    return first


def enter(model: nn.Module, roster: Roster, name: str, *, freeze: bool, active: bool) -> None:
    """Make `name` known, let parents that read changed weights know of it, and freeze the base."""
    roster.names.append(name)
    open_gate(model)
    watch(model, roster)
    first_call.watch(model, roster, name)
    if active:
        roster.default = ((name, 1.0),)
    if freeze:
        keep_still(model, roster)
        for parameter, owner in base_parameters(model):
            if parameter.requires_grad:
                roster.frozen.setdefault(owner, True)
                parameter.requires_grad_(False)


def base_parameters(model: nn.Module) -> Iterable[tuple[nn.Parameter, str]]:
    """(parameter, name) of the base model, without those of adapters."""
    for path, module in targeting.layers_of(model).items():
        for site, parameter in module._parameters.items():
            if parameter is not None:
                yield parameter, join_key(path, site)


def keep_still(model: nn.Module, roster: Roster) -> None:
    """Host every module with running statistics, so that they do not move under a frozen base."""
    for module in state.modules(model):
        if not isinstance(module, Host) and isinstance(module._buffers.get("running_mean"), Tensor):
            targeting.host_of_any(module).of(module, roster)


def watch(model: nn.Module, roster: Roster) -> None:
    """Host every module that reads weights of layers inside it (fast paths, own code), where one of those changes."""
    for module in state.modules(model):
        cls = None if isinstance(module, Host) else targeting.reader_of(module)
        if cls is not None:
            cls.of(module, roster)
    read = {id(inner) for _, host in state.hosts(model) for inner in host.read_inside()}
    for path, host in state.hosts(model):
        if host.base_class.forward is nn.Module.forward and host.adapters._modules and id(host) not in read:
            raise TargetError(
                f"{path!r} ({host.base_class.__name__}) has no forward and is never called, and no module around it reads it "
                "as self.<name> in its own forward: a change of its parameters would have no effect; leave it out (exclude=), "
                "or read it in the forward of the module that holds it"
            )


def check_finite(plan: list[Planned]) -> None:
    """Refuse weights that are NaN or infinite, if they are few enough to be read now."""
    items = [i for i in plan if i.stored.is_floating_point() and not i.stored.is_meta and i.stored.dtype.itemsize > 1]
    if sum(i.stored.numel() for i in items) > CHECKED_AT_ONCE:
        return
    for item in items:
        total = item.stored.detach().sum(dtype=torch.promote_types(item.stored.dtype, torch.float32))
        if not math.isfinite(float(total)) and not bool(torch.isfinite(item.stored).all()):
            bad = int((~torch.isfinite(item.stored)).sum())
            raise NonFinite(
                f"base weight {item.key!r} holds {bad} values that are NaN or infinite: reload the base model"
            )


def forget(model: nn.Module, roster: Roster, name: str) -> None:
    """Take adapter `name` out of every layer; a layer without adapters becomes what it was."""
    if name in roster.names:
        roster.names.remove(name)
    roster.notes.pop(name, None)
    roster.default = tuple((n, w) for n, w in roster.default if n != name)
    last = not roster.names
    mine = [host for _, host in state.hosts(model) if host.roster is roster]
    for host in mine:
        host.remove(name)
    quantised = any(FORMS in host._modules for host in mine)
    for host in mine:
        changes = host.adapters._modules or host.adapters.tied or FORMS in host._modules
        watches = isinstance(host, host.watches) or host.host.reads(host)
        stays = watches or isinstance(host._buffers.get("running_mean"), Tensor)
        if not changes and ((last and not (watches and quantised)) or not stays):
            host.release()
    if last:
        close_gate(model)
        first_call.remove(model, roster)
        roster.merged = None
        for parameter, key in list(base_parameters(model)):
            if roster.frozen.get(key):
                parameter.requires_grad_(True)
        roster.frozen.clear()


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take adapter `name`, or all of them, out of `model`: classes, module tree and `requires_grad` become what they were.

    Raises:
        UnknownName: there is no such adapter.
        ModelError: changes are merged into the weights (unmerge first; after `merge(keep=None)` it is allowed).
    """
    root = state.unwrap(model)
    state.unsharded(root, "detach")
    for roster in state.rosters(root):
        if roster.merged is not None and not roster.merged.final:
            raise ModelError(
                "cannot detach while changes are merged: dw.unmerge(model) first, or merge with keep=None to keep them for good"
            )
    if name is not None:
        state.known(root, name)
    for roster in state.rosters(root):
        for each in list(roster.names) if name is None else [name] if name in roster.names else []:
            forget(root, roster, each)
    return model


# ---- adapters as values


def get(model: nn.Module, name: str = "default") -> Adapter:
    """The adapter `name` of `model` as a value: its tensors are detached copies.

    Raises:
        UnknownName: there is no such adapter.
    """
    root = state.unwrap(model)
    state.known(root, name)
    changes = {}
    followers: dict[tuple[int, str], tuple[str, ...]] = {}
    for path, host in state.hosts(root):
        for site, (owner, theirs) in host.adapters.tied.get(name, {}).items():
            followers[id(owner), theirs] = (*followers.get((id(owner), theirs), ()), join_key(path, site))
    notes: dict[str, Any] = {}
    for path, host in state.hosts(root):
        notes = host.roster.notes.get(name, notes)
        for site, delta in host.deltas(name).items():
            variant, tensors = delta.kept()
            copies = {k: t.detach().clone() for k, t in tensors.items()}
            shape = tuple(host.parameter(site).shape)
            key = join_key(path, site)
            changes[key] = Change(
                variant, copies, host.listed_as(), shape, followers.get((id(host), parameter_of(site)), ())
            )
    return Adapter(changes, notes.get("base", {}), notes.get("extra", {}))


def install(
    model: nn.Module,
    adapter: Adapter,
    name: str = "default",
    *,
    active: bool = True,
    trainable: bool = False,
    freeze: bool = True,
) -> nn.Module:
    """Give `model` an adapter that exists already, as `name`. Strict: every change must find its parameter, and fit it.

    active: it speaks from now on, alone. trainable: its tensors require a gradient.

    Raises:
        AdapterError: a change names no parameter of this model, or has another shape; all of them are listed.
        NameTaken, ConfigError, ModelError: as `attach`.
    If anything is wrong, the model is left as it was.
    """
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"install takes an Adapter, as dw.get and dw.read give it; found {type(adapter).__name__}")
    root = state.unwrap(model)
    checked_name(root, name)
    state.unmerged(root, "load an adapter")
    plan = fitted(root, adapter)
    roster = one_roster(root)
    shared: dict[str, Any] = {}
    deltas = [(item, loaded(item, adapter, shared, trainable)) for item in plan]
    try:
        for item, delta in deltas:
            host = item.layer if isinstance(item.layer, Host) else item.host.of(item.layer, roster)
            if not item.stored.is_meta and not item.variant.any_shape:
                delta.prepare(host.frozen(item.site))
            host.add(name, item.site, delta)
            tie(item, host, name, roster)
        enter(root, roster, name, freeze=freeze, active=active)
        roster.notes[name] = {"base": dict(adapter.base), "extra": dict(adapter.extra)}
    except BaseException:
        forget(root, roster, name)
        raise
    return model


def loaded(item: Planned, adapter: Adapter, shared: dict[str, Any], trainable: bool) -> Delta:
    """A delta that holds the adapter's tensors (copies, in the site's dtype and on its device)."""
    change = adapter.changes[item.key]
    site = item.site_seen()
    with torch.device("meta"):
        delta = item.variant.create(Site(site.shape, site.dtype, torch.device("meta"), site.buffer), shared)
    expected = set(delta.state_dict())
    if set(change.tensors) != expected:
        raise AdapterError(
            f"{item.key!r}: {item.variant} has the tensors {sorted(expected)}, the adapter holds {sorted(change.tensors)}"
        )
    tensors = {
        k: t.detach().to(site.device, site.dtype if t.is_floating_point() else t.dtype, copy=True)
        for k, t in change.tensors.items()
    }
    delta.load_state_dict(tensors, strict=True, assign=True)
    delta.site = site
    delta.requires_grad_(trainable)
    return delta
