"""Attach, install and detach: adapters come to a model and leave it, and nothing else of it changes.

Everything is checked before anything changes: first a plan (which parameter of which module gets which variant), then
the deltas, and only then the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change, join_key, split_key
from deltaw.core.host import CHILD, Host
from deltaw.core.registry import variants as variant_registry
from deltaw.core.roster import Roster
from deltaw.core.variant import Delta, Dense, Site, Variant, fits
from deltaw.errors import AdapterError, ConfigError, ModelError, NameTaken, NonFinite, TargetError, did_you_mean
from deltaw.model import state, targeting

NAME = re.compile(r"[A-Za-z0-9_\-]+")
CHECKED_AT_ONCE = 2**24
"""Up to so many values in all, the targeted weights are checked to be finite at attach; larger ones where they are read anyway."""


@dataclass
class Planned:
    """One parameter to be changed: where, by what, and the host class that its layer will have."""

    path: str
    layer: nn.Module
    site: str
    variant: Variant
    host: type[Host]
    pattern: str = ""

    @property
    def key(self) -> str:
        """The parameter's name in the base."""
        return join_key(self.path, self.site)

    @property
    def stored(self) -> Tensor:
        """The frozen parameter or buffer."""
        found = self.layer._parameters.get(self.site)
        return found if found is not None else self.layer._buffers[self.site]  # type: ignore[return-value]


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
        ModelError: changes are merged into the weights.
    If anything is wrong, the model is left as it was.
    """
    root = state.unwrap(model)
    checked_name(root, name)
    state.unmerged(root, "attach")
    plan = planned(root, pairs(variants, targets), train, exclude, layers)
    place(root, plan, name, freeze=freeze, active=active)
    return model


def checked_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or that cannot be one."""
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


def planned(
    model: nn.Module,
    wanted: list[tuple[targeting.Target, Variant]],
    train: str | Sequence[str],
    exclude: Any,
    layers: Sequence[int] | range | None,
) -> list[Planned]:
    """What `attach` will do, one entry per parameter. Raises TargetError or ConfigError; changes nothing."""
    known = targeting.layers_of(model)
    left = [p for t in (targeting.as_targets(exclude) if exclude else []) for p in targeting.matching(model, t, known)]
    by_site: dict[tuple[int, str], Planned] = {}

    trained: list[str] = []
    full = variant_registry["full"]()
    for name in [train] if isinstance(train, str) else list(train):
        for item in trained_in_full(model, name, known, full):
            trained.append(item.path)
            add(by_site, item)
    for target, variant in wanted:
        leave = [*left, *trained] if target == targeting.ALL_LINEAR else left
        paths = targeting.in_layers(targeting.matching(model, target, known, leave), layers)
        if not paths:
            raise TargetError(
                f"{targeting.describe(target)} matches layers, but none is left after exclude={exclude!r}, layers={layers!r}"
            )
        if variant.any_shape:
            for item in (i for p in paths for i in subtree(p, known, variant)):
                item.pattern = targeting.describe(target)
                add(by_site, item)
        else:
            for item in adapted(model, target, variant, paths, known):
                add(by_site, item)
    return list(by_site.values())


def add(by_site: dict[tuple[int, str], Planned], item: Planned) -> None:
    """Enter `item` unless the very same is there (a layer reached by two paths). Two different wishes are an error."""
    before = by_site.setdefault((id(item.layer), item.site), item)
    if before.variant != item.variant:
        raise ConfigError(
            f"{item.path!r} is wanted by {before.pattern} as {before.variant} and by {item.pattern} as {item.variant}: "
            "make the targets disjoint, or use exclude="
        )


def adapted(
    model: nn.Module, target: targeting.Target, variant: Variant, paths: Sequence[str], known: dict[str, nn.Module]
) -> list[Planned]:
    """The layers among `paths` with their sites. Containers that a pattern also matches are passed over."""
    found: list[Planned] = []
    misfits: list[str] = []
    for path in paths:
        layer = known[path]
        cls = targeting.host_for(layer)
        if cls is None:
            if any(True for _ in layer.parameters(recurse=False)):
                misfits.append(path)
            continue
        if targeting.belongs_to_parent(path, known):
            raise TargetError(
                f"{path!r} is read, never called, by its {type(known[path.rpartition('.')[0]]).__name__}: "
                "target the attention module itself"
            )
        check_free(path, layer)
        found += [Planned(path, layer, s, variant, cls, targeting.describe(target)) for s in cls.main_sites(layer)]
        if variant.bias and layer._parameters.get("bias") is not None:
            full = variant_registry["full"]()
            found.append(Planned(path, layer, "bias", full, cls, targeting.describe(target)))
    if misfits:
        kind = type(known[misfits[0]]).__name__
        raise TargetError(
            f"{targeting.describe(target)} matches {misfits[0]!r}, a {kind}, which {type(variant).__name__} cannot adapt; "
            f"narrow the target, or train it in full: train=[{misfits[0]!r}]"
        )
    if not found:
        inner = [p for path in paths for p in known if p.startswith(path + ".") and targeting.host_for(known[p])]
        raise TargetError(
            f"{targeting.describe(target)} matches only containers such as {paths[0]!r} "
            f"({type(known[paths[0]]).__name__}); name layers inside, for example {', '.join(map(repr, inner[:3])) or '...'}"
        )
    return found


def check_free(path: str, layer: nn.Module) -> None:
    """Refuse a layer that has something of its own called `adapters` or `roster`."""
    if isinstance(layer, Host):
        return
    for attribute in (CHILD, "roster"):
        if hasattr(layer, attribute):
            raise TargetError(
                f"{path!r} ({type(layer).__name__}) has an attribute {attribute!r} of its own, which deltaw needs"
            )


def trained_in_full(model: nn.Module, name: str, known: dict[str, nn.Module], full: Variant) -> list[Planned]:
    """The parameters that `train=name` means: those of the modules it names, or one parameter.

    Raises:
        TargetError: it names nothing, or something without parameters.
    """
    found: list[Planned] = []
    try:
        paths = targeting.exact(model, name, known)
    except TargetError:
        paths = []
        for path, layer in known.items():
            for site, parameter in layer._parameters.items():
                key = join_key(path, site)
                if parameter is not None and (key == name or key.endswith("." + name)):
                    found.append(Planned(path, layer, site, full, full_host(layer), f"train={name!r}"))
        if not found:
            raise
    for path in paths:
        found += subtree(path, known, full)
    for item in found:
        item.pattern = f"train={name!r}"
    if not found:
        raise TargetError(f"train={name!r} names {type(known[paths[0]]).__name__}, which has no parameters")
    return found


def subtree(path: str, known: dict[str, nn.Module], full: Variant) -> list[Planned]:
    """Every parameter and running statistic of the module at `path` and of those inside it."""
    found = []
    for inner, layer in known.items():
        if inner != path and not inner.startswith(path + ".") and path:
            continue
        own = [s for s, p in layer._parameters.items() if p is not None]
        kept = [s for s, b in layer._buffers.items() if b is not None and s not in layer._non_persistent_buffers_set]
        if own:
            check_free(inner, layer)
            found += [Planned(inner, layer, s, full, full_host(layer)) for s in (*own, *kept)]
    return found


def full_host(layer: nn.Module) -> type[Host]:
    """The host under which a layer's parameters are trained in full: its family's own, or the host of last resort."""
    return targeting.host_for(layer) or targeting.host_of_any(layer)


# ---- from a plan to a changed model


def place(model: nn.Module, plan: list[Planned], name: str, *, freeze: bool, active: bool) -> None:
    """Carry out a plan with freshly started deltas."""
    check_finite(plan)
    shared: dict[str, Any] = {}
    deltas = [(item, item.variant.create(site_of(item), shared)) for item in plan]
    fresh = [item.layer for item in plan if not isinstance(item.layer, Host)]
    roster = one_roster(model)
    try:
        for item, delta in deltas:
            host = item.layer if isinstance(item.layer, Host) else item.host.of(item.layer, roster)
            if not item.stored.is_meta:
                delta.start(host.frozen(item.site) if not item.variant.any_shape else Dense(item.stored))
            host.add(name, item.site, delta)
        enter(model, roster, name, freeze=freeze, active=active)
    except BaseException:
        forget(model, roster, name, fresh)
        raise


def site_of(item: Planned, trainable: bool = True) -> Site:
    """The site as the variant sees it: shape, dtype and device of the adapter's tensors."""
    stored = item.stored
    buffer = item.site in item.layer._buffers
    dtype = stored.dtype
    if not buffer and (dtype.itemsize <= 2 or not dtype.is_floating_point):
        dtype = torch.float32
    if item.variant.any_shape:
        return Site(tuple(stored.shape), dtype, stored.device, buffer)
    return Site(item.host.sites(item.layer)[item.site], dtype, stored.device)


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
    """Make `name` known, and freeze the base."""
    roster.names.append(name)
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
    for _, module in list(model.named_modules()):
        if not isinstance(module, Host) and isinstance(module._buffers.get("running_mean"), Tensor):
            targeting.host_of_any(module).of(module, roster)


def check_finite(plan: list[Planned]) -> None:
    """Refuse weights that are NaN or infinite, if they are few enough to be read now."""
    items = [i for i in plan if i.stored.is_floating_point() and not i.stored.is_meta]
    if sum(i.stored.numel() for i in items) > CHECKED_AT_ONCE:
        return
    for item in items:
        total = item.stored.detach().sum(dtype=torch.promote_types(item.stored.dtype, torch.float32))
        if not math.isfinite(float(total)) and not bool(torch.isfinite(item.stored).all()):
            bad = int((~torch.isfinite(item.stored)).sum())
            raise NonFinite(
                f"base weight {item.key!r} holds {bad} values that are NaN or infinite: reload the base model"
            )


def forget(model: nn.Module, roster: Roster, name: str, fresh: Iterable[nn.Module] = ()) -> None:
    """Take adapter `name` out of every layer; a layer without adapters becomes what it was."""
    if name in roster.names:
        roster.names.remove(name)
    roster.notes.pop(name, None)
    roster.default = tuple((n, w) for n, w in roster.default if n != name)
    last = not roster.names
    for _, host in list(state.hosts(model)):
        if host.roster is roster:
            host.remove(name)
            still = isinstance(host._buffers.get("running_mean"), Tensor)
            if not host.adapters._modules and (last or not still):
                host.release()
    if last:
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
    notes: dict[str, Any] = {}
    for path, host in state.hosts(root):
        notes = host.roster.notes.get(name, notes)
        for site, delta in host.deltas(name).items():
            variant, tensors = delta.kept()
            copies = {k: t.detach().clone() for k, t in tensors.items()}
            shape = tuple(host.parameter(site).shape)
            changes[join_key(path, site)] = Change(variant, copies, host.family, shape)
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
    root = state.unwrap(model)
    checked_name(root, name)
    state.unmerged(root, "load an adapter")
    plan = fitted(root, adapter)
    roster = one_roster(root)
    fresh = [item.layer for item in plan if not isinstance(item.layer, Host)]
    shared: dict[str, Any] = {}
    deltas = [(item, loaded(item, adapter, shared, trainable)) for item in plan]
    try:
        for item, delta in deltas:
            host = item.layer if isinstance(item.layer, Host) else item.host.of(item.layer, roster)
            if not item.stored.is_meta and not item.variant.any_shape:
                delta.prepare(host.frozen(item.site))
            host.add(name, item.site, delta)
        enter(root, roster, name, freeze=freeze, active=active)
        roster.notes[name] = {"base": dict(adapter.base), "extra": dict(adapter.extra)}
    except BaseException:
        forget(root, roster, name, fresh)
        raise
    return model


def fitted(model: nn.Module, adapter: Adapter) -> list[Planned]:
    """The plan that puts every change of `adapter` on its parameter; AdapterError lists all that do not fit."""
    if not adapter.changes:
        raise AdapterError("the adapter is empty: it changes no weight")
    known = targeting.layers_of(model)
    wrong: list[str] = []
    plan: list[Planned] = []
    for key, change in adapter.changes.items():
        path, site = split_key(key)
        layer = known.get(path)
        there = layer is not None and (layer._parameters.get(site) is not None or layer._buffers.get(site) is not None)
        if layer is None or not there:
            every = [join_key(p, s) for p, m in known.items() for s in m._parameters]
            wrong.append(f"{key!r} is no parameter of {type(model).__name__}{did_you_mean(key, every, 1)}")
            continue
        cls = full_host(layer) if change.variant.any_shape else targeting.host_for(layer)
        if cls is None or (not change.variant.any_shape and site not in cls.sites(layer)):
            wrong.append(
                f"{key!r} belongs to a {type(layer).__name__}, which {type(change.variant).__name__} cannot adapt"
            )
            continue
        item = Planned(path, layer, site, change.variant, cls)
        expected = tuple(item.stored.shape) if change.variant.any_shape else cls.sites(layer)[site]
        try:
            found = change.matrix_shape
        except KeyError as missing:
            wrong.append(f"{key!r}: tensor {missing} of {change.variant} is missing")
            continue
        if not fits(found, expected):
            wrong.append(f"{key!r} changes a {tuple(found)} weight, the model's is {tuple(expected)}")
            continue
        plan.append(item)
    if wrong:
        more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AdapterError(
            f"the adapter does not fit {type(model).__name__} ({len(wrong)} of {len(adapter.changes)} changes):\n  "
            + "\n  ".join(wrong[:8])
            + more
        )
    return plan


def loaded(item: Planned, adapter: Adapter, shared: dict[str, Any], trainable: bool) -> Delta:
    """A delta that holds the adapter's tensors (copies, in the site's dtype and on its device)."""
    change = adapter.changes[item.key]
    site = site_of(item)
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
