"""The plan of an attach: which parameter of which layer gets which variant. Nothing changes while it is made."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import nn

from deltaw.core.adapter import join_key
from deltaw.core.beside import own_class
from deltaw.core.host import Host, parameter_names
from deltaw.core.part import parameter_of
from deltaw.core.registry import variants as variant_registry
from deltaw.core.variant import Variant
from deltaw.errors import ConfigError, TargetError
from deltaw.model import targeting, ties
from deltaw.model.planned import Planned, check_free, full_host
from deltaw.model.state import Layout

Wanted = dict[tuple[Hashable, str], Planned]
"""The plan while it grows: (identity of the parameter, the part of it) -> what happens to it."""


def planned(
    layout: Layout,
    wanted: list[tuple[targeting.Target, Variant]],
    train: str | Sequence[str],
    exclude: Any,
    layers: Sequence[int] | range | None,
) -> list[Planned]:
    """What `attach` will do, one entry per parameter. Raises TargetError or ConfigError; changes nothing."""
    model, known = layout.root, layout.layers
    try:
        left = (
            [p for t in targeting.as_targets(exclude) for p in targeting.matching(model, t, known)] if exclude else []
        )
    except TargetError as error:
        raise TargetError(str(error).replace("targets=", "exclude=", 1)) from None
    plan: Wanted = {}
    if layers is not None and (isinstance(layers, str) or not all(type(i) is int for i in numbers(layers))):
        raise TargetError(
            f"layers={layers!r}: give the indices of blocks, for example layers=[0, 1] or layers=range(6)"
        )
    names = [train] if isinstance(train, str) else list(train)
    if not all(isinstance(name, str) for name in names):
        raise TargetError(f"train={train!r}: give names of modules, for example train=['classifier']")

    trained: list[str] = []
    full = variant_registry["full"]()
    for name in names:
        for item in trained_in_full(model, name, known, full):
            trained.append(item.path)
            add(plan, item)
    for target, variant in wanted:
        leave = [*left, *trained] if target == targeting.ALL_LINEAR else left
        for item in meant(model, target, variant, known, leave, layers, exclude):
            add(plan, item)
    shared = ties.shared(layout.parameters)
    for item in plan.values():
        item.tied = ties.others(shared, item.layer, parameter_of(item.site))
        for path, layer, _ in item.tied:
            check_free(path, layer)
    return list(plan.values())


def numbers(layers: Any) -> list[Any]:
    """The indices of blocks that `layers` lists; what is no list counts as one that is wrong."""
    return list(layers) if isinstance(layers, Iterable) else [None]


def add(plan: Wanted, item: Planned) -> None:
    """Enter `item` unless the very same is there (a layer reached by two paths, a tied parameter).

    Raises:
        ConfigError: two different wishes for one parameter.
    """
    before = plan.setdefault((item.identity, item.site.removeprefix(parameter_of(item.site))), item)
    if before is not item and before.variant != item.variant:
        one = (
            f"{item.key!r}"
            if before.key == item.key
            else f"{item.key!r}, which is the same parameter as {before.key!r},"
        )
        raise ConfigError(
            f"{one} is wanted by {before.pattern} as {before.variant} and by {item.pattern} as {item.variant}: "
            "make the targets disjoint, or use exclude="
        )


def meant(
    model: nn.Module,
    target: targeting.Target,
    variant: Variant,
    known: dict[str, nn.Module],
    leave: Sequence[str],
    layers: Sequence[int] | range | None,
    exclude: Any,
) -> list[Planned]:
    """The parameters that one target means: of the layers that it names, or those that it names themselves."""
    name, parts = targeting.parts_of(target)
    pattern = targeting.describe(target)
    try:
        paths = targeting.matching(model, name, known, leave)
    except TargetError:
        places = [(p, s) for p, s in targeting.parameters(name, known) if p not in set(leave)]
        if not places:
            raise
        kept = set(targeting.in_layers([p for p, _ in places], layers))
        found = [parameter_planned(p, known[p], s, variant, pattern) for p, s in places if p in kept]
    else:
        paths = targeting.in_layers(paths, layers)
        if not paths:
            found = []
        elif variant.any_shape:
            found = [i for p in paths for i in subtree(p, known, variant)]
        else:
            found = adapted(target, variant, paths, known, bool(parts))
    if not found:
        raise TargetError(f"{pattern} matches layers, but none is left after exclude={exclude!r}, layers={layers!r}")
    if parts:
        found = [p for item in found for p in in_parts(item, parts, pattern)]
    for item in found:
        item.pattern = item.pattern or pattern
    return found


def parameter_planned(path: str, layer: nn.Module, site: str, variant: Variant, pattern: str) -> Planned:
    """The plan for a parameter that a target names itself.

    Raises:
        TargetError: it is no matrix (nor a stack of them), and the variant needs one.
    """
    check_free(path, layer)
    if variant.any_shape:
        return Planned(path, layer, site, variant, full_host(layer), pattern)
    host = targeting.host_for_parameter(layer, site)
    if host is None:
        shape = tuple(layer._parameters[site].shape)  # type: ignore[union-attr]
        raise TargetError(
            f"{pattern} names {join_key(path, site)!r} {shape}, which {type(variant).__name__} cannot adapt: it takes "
            f"matrices and stacks of them; train it in full: train=[{join_key(path, site)!r}]"
        )
    return Planned(path, layer, site, variant, host, pattern)


def in_parts(item: Planned, parts: Sequence[tuple[int, int]], pattern: str) -> list[Planned]:
    """`item` once for each part, rows [start, stop) of its matrix.

    Raises:
        TargetError: a part lies outside of the weight, or the variant changes whole parameters only.
    """
    if item.variant.any_shape:
        if item.site in item.host.biases(item.layer):
            return [item]
        raise TargetError(f"{pattern}: {type(item.variant).__name__} changes whole parameters, no parts of them")
    out = item.shape[-2]
    for start, stop in parts:
        if not 0 <= start < stop <= out:
            raise TargetError(f"{pattern}: {item.key!r} has the rows 0:{out}; {start}:{stop} is no part of them")
    return [Planned(item.path, item.layer, f"{item.site}[{a}:{b}]", item.variant, item.host, pattern) for a, b in parts]


def adapted(
    target: targeting.Target, variant: Variant, paths: Sequence[str], known: dict[str, nn.Module], one: bool
) -> list[Planned]:
    """The layers among `paths` with their sites. Containers that a pattern also matches are passed over.

    one: exactly one weight of each layer is wanted (the target names parts of it).
    """
    found: list[Planned] = []
    misfits: list[str] = []
    for path in paths:
        cls = targeting.host_for(known[path])
        if cls is not None:
            found += layer_planned(path, known[path], cls, variant, target, one)
        elif any(True for _ in known[path].parameters(recurse=False)):
            misfits.append(path)
    if misfits:
        sample = known[misfits[0]]
        raise TargetError(
            f"{targeting.describe(target)} matches {misfits[0]!r}, a {type(sample).__name__}, "
            f"which {type(variant).__name__} cannot adapt; narrow the target, "
            f"{parameters_hint(misfits[0], sample)}or train it in full: train=[{misfits[0]!r}]"
        )
    if not found:
        inner = [p for path in paths for p in known if p.startswith(path + ".") and targeting.host_for(known[p])]
        if not inner:
            raise TargetError(
                f"{targeting.describe(target)} matches {paths[0]!r}, a {kind_of(known[paths[0]])}, which has no parameter that "
                f"{type(variant).__name__} could adapt, nor has a layer inside it; name other layers"
            )
        raise TargetError(
            f"{targeting.describe(target)} matches only containers such as {paths[0]!r} "
            f"({type(known[paths[0]]).__name__}); name layers inside, for example {', '.join(map(repr, inner[:3])) or '...'}"
        )
    return found


def kind_of(layer: nn.Module) -> str:
    """A layer's class, with its module where that is not the usual one."""
    kind = own_class(layer)
    return kind.__name__ if kind.__module__.startswith("torch.nn.modules") else f"{kind.__module__}.{kind.__name__}"


def parameters_hint(path: str, layer: nn.Module) -> str:
    """How to name the matrices among a layer's raw parameters, for a message."""
    sites = [s for s in layer._parameters if targeting.host_for_parameter(layer, s)]
    return f"name its parameters (targets=[{join_key(path, sites[0])!r}]), " if sites else ""


def layer_planned(
    path: str, layer: nn.Module, cls: type[Host], variant: Variant, target: targeting.Target, one: bool
) -> list[Planned]:
    """The sites of one layer, its children that belong to it, and its biases if the variant trains them."""
    pattern = targeting.describe(target)
    check_free(path, layer)
    why = None if isinstance(layer, Host) else cls.refusal(layer)
    if why is not None:
        raise TargetError(f"{pattern} matches {path!r} ({type(layer).__name__}): {why}")
    sites = cls.main_sites(layer)
    check_stored(path, layer, sites, pattern)
    if one and len(sites) != 1:
        raise TargetError(
            f"{pattern}: {path!r} ({type(layer).__name__}) has the weights {', '.join(map(repr, sites))}; "
            f"name the one that is meant, for example '{join_key(path, sites[0])}[...]'"
        )
    found = [Planned(path, layer, s, variant, cls, pattern) for s in sites]
    if variant.bias:
        full = variant_registry["full"]()
        found += [Planned(path, layer, b, full, cls, pattern) for b in cls.biases(layer)]
    for child in () if one else cls.children_too:
        inner = layer._modules[child]
        host = None if inner is None else targeting.host_for(inner)
        if inner is not None and host is not None:
            found += layer_planned(join_key(path, child), inner, host, variant, target, False)
    return found


def check_stored(path: str, layer: nn.Module, sites: Sequence[str], pattern: str) -> None:
    """Refuse a weight that is computed at every call (weight_norm, spectral_norm, any parametrization).

    Raises:
        TargetError: with the parameters that it is computed from, and how to make it a plain weight.
    """
    names = parameter_names(layer)
    for site in sites:
        if site not in names:
            sources = [n for n, _ in layer.named_parameters() if site in n]
            raise TargetError(
                f"{pattern} matches {path!r} ({type(layer).__name__}), whose {site!r} is computed from "
                f"{', '.join(map(repr, sources)) or 'something else'} at every call, as weight_norm and spectral_norm do: "
                f"make it a plain weight first (torch.nn.utils.parametrize.remove_parametrizations(layer, {site!r}), or "
                f"torch.nn.utils.remove_weight_norm(layer)), train it in full (train=[{path!r}]), or leave it out (exclude=)"
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
            for site in parameter_names(layer):
                key = join_key(path, site)
                if key == name or key.endswith("." + name):
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
        own = parameter_names(layer)
        kept = [s for s, b in layer._buffers.items() if b is not None and s not in layer._non_persistent_buffers_set]
        if own:
            check_free(inner, layer)
            found += [Planned(inner, layer, s, full, full_host(layer)) for s in (*own, *kept)]
    return found
