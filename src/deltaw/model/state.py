"""Finding one's way in a model: the module behind wrappers, its hosts, its roster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from deltaw.core.host import CHILD, FORMS, Host
from deltaw.core.roster import Roster
from deltaw.errors import ModelError, UnknownName, did_you_mean

WRAPPED_AS = ("_orig_mod", "module")
"""Attributes under which `torch.compile`, DDP and Accelerate keep the model that they wrap."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model behind DDP, DataParallel, `torch.compile` or Accelerate."""
    while True:
        inner = next((model._modules.get(a) for a in WRAPPED_AS if _wraps(model, a)), None)
        if inner is None:
            return model
        model = inner


def _wraps(model: nn.Module, attribute: str) -> bool:
    known = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    return type(model).__name__ in known and attribute in model._modules


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module of `model` once, in the order of `model.modules()`, adapters and forms left out."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [unwrap(model)]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append(module)
        children: dict[str, nn.Module | None] = module._modules
        if children:
            if isinstance(module, Host):
                children = {name: child for name, child in children.items() if name not in (CHILD, FORMS)}
            waiting.extend(child for child in reversed(children.values()) if child is not None)
    return found


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """(path, host) of every host of `model`; a layer reached by two paths comes once."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, Host]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        skip: tuple[str, ...] = ()
        if isinstance(module, Host):
            skip = (CHILD, FORMS)
            yield path, module
        for name, child in module._modules.items():
            if child is not None and name not in skip:
                yield from walk(f"{path}.{name}" if path else name, child)

    yield from list(walk("", unwrap(model)))


def rosters(model: nn.Module) -> list[Roster]:
    """The rosters that the hosts of `model` follow: one, unless parts were adapted on their own."""
    found: dict[int, Roster] = {}
    for module in modules(model):
        roster = module.__dict__.get("roster")
        if isinstance(roster, Roster):
            found[id(roster)] = roster
    return list(found.values())


def names(model: nn.Module) -> list[str]:
    """The names of the adapters that `model` carries, in the order in which they came."""
    return names_in(rosters(model))


def names_in(rosters: Sequence[Roster]) -> list[str]:
    """The names of the adapters of these rosters."""
    return list(dict.fromkeys(name for roster in rosters for name in roster.names))


def known(model: nn.Module, name: str) -> str:
    """`name`, if `model` carries an adapter of that name.

    Raises:
        UnknownName: it does not; the message holds the names that it has.
    """
    return known_in(rosters(model), model, name)


def known_in(rosters: Sequence[Roster], model: nn.Module, name: str) -> str:
    """`known`, where the rosters are at hand."""
    have = names_in(rosters)
    if name not in have:
        raise UnknownName(
            f"{type(unwrap(model)).__name__} has no adapter {name!r}{did_you_mean(name, have)} "
            f"(it has: {', '.join(map(repr, have)) or 'none; attach or load one first'})"
        )
    return name


def unmerged(model: nn.Module, verb: str) -> None:
    """Refuse what cannot be done while changes are merged into the weights.

    Raises:
        ModelError: some adapter is merged.
    """
    unmerged_in(rosters(model), verb)


def unmerged_in(rosters: Sequence[Roster], verb: str) -> None:
    """`unmerged`, where the rosters are at hand."""
    merged = [n for roster in rosters if roster.merged is not None for n in roster.merged.names]
    if merged:
        raise ModelError(
            f"cannot {verb}: {', '.join(map(repr, merged))} merged into the weights; call dw.unmerge(model) first"
        )


def unsharded(model: nn.Module, verb: str) -> None:
    """Refuse what would change the classes or parameters of a model that FSDP has sharded.

    Raises:
        ModelError: some module is sharded.
    """
    for module in modules(model):
        if any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__):
            raise ModelError(
                f"cannot {verb}: FSDP has sharded a {type(module).__name__}; attach, load and quantize before sharding, and "
                "detach in a process that loads the model whole"
            )


def ready(model: nn.Module, verb: str) -> None:
    """Refuse models whose layers are no Python objects any more (TorchScript), or have no shapes yet (LazyLinear).

    Raises:
        ModelError: such a module, by its class.
    """
    for module in modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            name = getattr(module, "original_name", type(module).__name__)
            raise ModelError(
                f"cannot {verb}: its {name} is scripted or traced (TorchScript); do so before torch.jit.script"
            )
        if any(p is not None and is_lazy(p) for p in module._parameters.values()):
            raise ModelError(
                f"cannot {verb}: the weights of a {type(module).__name__} have no shape yet; run the model once"
            )
