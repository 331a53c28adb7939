"""Finding one's way in a model: the module behind wrappers, its layers by path, its hosts, its roster.

A verb that asks several questions walks the model once, into a `Layout`, and asks that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deltaw.core.host import CHILD, FORMS, Host
from deltaw.core.roster import Roster
from deltaw.errors import ModelError, UnknownName, did_you_mean

WRAPPED_AS = ("_orig_mod", "module")
"""Attributes under which `torch.compile`, DDP and Accelerate keep the model that they wrap."""
WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model behind DDP, DataParallel, `torch.compile` or Accelerate."""
    while True:
        inner = next((model._modules.get(a) for a in WRAPPED_AS if _wraps(model, a)), None)
        if inner is None:
            return model
        model = inner


def _wraps(model: nn.Module, attribute: str) -> bool:
    return type(model).__name__ in WRAPPERS and attribute in model._modules


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of `model` by path (all paths of a shared one), adapters and forms left out."""
    found: dict[str, nn.Module] = {}

    def walk(start: str, module: nn.Module) -> None:
        skip = (CHILD, FORMS) if isinstance(module, Host) else ()
        for name, child in module._modules.items():
            if child is not None and name not in skip:
                path = start + name
                found[path] = child
                if child._modules:
                    walk(f"{path}.", child)

    found[""] = model
    walk("", model)
    return found


def parameters_of(layers: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """(path, layer, name, parameter) of all parameters that these layers hold themselves."""
    return [
        (path, layer, name, parameter)
        for path, layer in layers.items()
        if layer._parameters
        for name, parameter in layer._parameters.items()
        if parameter is not None
    ]


class Layout:
    """A model as one walk found it. Attaching changes classes, not this tree, so it holds while a verb is at work.

    root: the model behind its wrappers. layers: every module by path, all paths of a shared one.
    modules: each module once, in the order of `root.modules()`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = unwrap(model)
        self.layers = layers_of(self.root)
        self.modules = list({id(m): m for m in self.layers.values()}.values())

    @functools.cached_property
    def parameters(self) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
        """What these layers hold, as `parameters_of` gives it, when first asked."""
        return parameters_of(self.layers)

    def hosts(self) -> list[tuple[str, Host]]:
        """(path, host) of every host; a layer reached by two paths comes once."""
        found: dict[int, tuple[str, Host]] = {}
        for path, module in self.layers.items():
            if isinstance(module, Host):
                found.setdefault(id(module), (path, module))
        return list(found.values())

    def rosters(self) -> list[Roster]:
        """The rosters that the hosts follow: one, unless parts were adapted on their own."""
        if not any(issubclass(kind, Host) for kind in set(map(type, self.modules))):
            return []
        return list({id(m.roster): m.roster for m in self.modules if isinstance(m, Host)}.values())

    def unsharded(self, verb: str) -> None:
        """Refuse what would change the classes or parameters of a model that FSDP has sharded.

        Raises:
            ModelError: some module is sharded.
        """
        for kind in dict.fromkeys(map(type, self.modules)):
            if any(c.__name__ in SHARDED for c in kind.__mro__):
                raise ModelError(
                    f"cannot {verb}: FSDP has sharded a {kind.__name__}; attach, load and quantize before sharding, and "
                    "detach in a process that loads the model whole"
                )

    def ready(self, verb: str) -> None:
        """Refuse models whose layers are no Python objects any more (TorchScript), or have no shapes yet (LazyLinear).

        Raises:
            ModelError: such a module, by its class.
        """
        for module in {type(m): m for m in reversed(self.modules)}.values():
            if isinstance(module, torch.jit.ScriptModule):
                name = getattr(module, "original_name", type(module).__name__)
                raise ModelError(
                    f"cannot {verb}: its {name} is scripted or traced (TorchScript); do so before torch.jit.script"
                )
        for _, layer, _, parameter in {type(place[3]): place for place in self.parameters}.values():
            if is_lazy(parameter):
                raise ModelError(
                    f"cannot {verb}: the weights of a {type(layer).__name__} have no shape yet; run the model once"
                )


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module of `model` once, in the order of `model.modules()`, adapters and forms left out."""
    return Layout(model).modules


def hosts(model: nn.Module) -> list[tuple[str, Host]]:
    """(path, host) of every host of `model`; a layer reached by two paths comes once."""
    return Layout(model).hosts()


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base in the order of `named_modules`, each once, without the modules of adapters."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = module._modules
        if children:
            skip = (CHILD, FORMS) if isinstance(module, Host) else ()
            for name in reversed(children):
                child = children[name]
                if child is not None and name not in skip:
                    waiting.append((f"{path}.{name}" if path else name, child))


def rosters(model: nn.Module) -> list[Roster]:
    """The rosters that the hosts of `model` follow: one, unless parts were adapted on their own. Switching asks no more."""
    found: dict[int, Roster] = {}
    seen: set[int] = set()
    waiting = [unwrap(model)]
    while waiting:
        module = waiting.pop()
        inside = module._modules
        if isinstance(module, Host):
            found[id(module.roster)] = module.roster
            inside = {name: m for name, m in inside.items() if name not in (CHILD, FORMS)}
        if inside and id(module) not in seen:
            seen.add(id(module))
            waiting += [inner for inner in reversed(inside.values()) if inner is not None]
    return list(found.values())


def unsharded(model: nn.Module, verb: str) -> None:
    """`Layout.unsharded` of a model."""
    Layout(model).unsharded(verb)


def sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor (a DTensor: FSDP2, tensor parallelism)."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # only where something odd is met: this import is not quick

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, detached; of one that is sharded, all of it, gathered: every process must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of `model` is sharded."""
    return any(map(sharded, model.parameters()))


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
