"""Modules whose own code reads the weights of layers inside them instead of calling those layers.

Mamba's mixer multiplies by `self.dt_proj.weight`, language models by `self.embed.weight`. A change of such a layer that
only shows in its call would be silently dead (it is in PEFT). So the code of a module's class is read once: what its
forward, and the methods that this uses, take as `self.<layer>.<parameter>` is found, and where such a layer changes, the
module runs on a twin in which that layer is a plain one with W + ΔW. Asking for a dtype, device or shape is no reading,
unless the weight is kept in another form, whose dtype is not that of the weight.

Weights that are fetched in other ways (`self.layers[i].weight`, a function that is given the layer) are not found here;
the first call of the model names layers that were never called (see model/first_call.py).
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltaw.core.host import FORMS, Host
from deltaw.core.twin import shell

FACTS = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "nelement", "element_size"}
FACTS |= {"requires_grad", "is_meta", "is_cuda", "is_floating_point"}
"""What may be asked of a weight without reading its values."""


class Read(NamedTuple):
    """`self.<path>.<site>` in a module's code ("" for `self.<path>` itself). `values`: not only one of the `FACTS` is asked."""

    path: tuple[str, ...]
    site: str
    values: bool = True


_found: dict[type[nn.Module], dict[str, list[Read]]] = {}


def reads_in(kind: type[nn.Module]) -> dict[str, list[Read]]:
    """What a call of a module of class `kind` reads, by the first name after `self`, as far as its code tells; torch.nn's
    own classes are left out."""
    found = _found.get(kind)
    if found is None:
        own = [c for c in kind.__mro__ if issubclass(c, nn.Module) and not c.__module__.startswith("torch.nn.")]
        own = [c for c in own if not issubclass(c, Host)]
        found = _found[kind] = {}
        for read in dict.fromkeys(read for code in reached(own) for read in chains(code)):
            found.setdefault(read.path[0], []).append(read)
    return found


def reached(classes: list[type[nn.Module]]) -> Iterator[CodeType]:
    """The code of `forward` and of all methods and properties that it reaches by name, in these classes."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for code in (c for cls in classes for c in codes(cls.__dict__.get(name))):
            yield code
            new = set(names_in(code)) - seen
            seen |= new
            waiting.extend(new)


def codes(attribute: Any) -> list[CodeType]:
    """The code of a method or property of a class, what decorators have wrapped included; [] for anything else."""
    if isinstance(attribute, property):
        attribute = attribute.fget
    if isinstance(attribute, (staticmethod, classmethod)):
        attribute = attribute.__func__
    function = inspect.unwrap(attribute) if callable(attribute) else None
    if not isinstance(function, FunctionType):
        return []
    return [function.__code__, *(c for c in function.__code__.co_consts if isinstance(c, CodeType))]


def names_in(code: CodeType) -> tuple[str, ...]:
    """The attributes (and globals) that a function names."""
    return code.co_names


def chains(code: CodeType) -> Iterator[Read]:
    """Every `self.a.b.c` in a function, at each place where it may be split into a layer and its parameter."""
    me = next(iter(code.co_varnames or code.co_freevars), "self")
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "PUSH_NULL", "RESUME", "PRECALL")]
    for i, step in enumerate(steps):
        loads = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) or loads[-1] not in (me, "self"):
            continue
        asked = i > 0 and steps[i - 1].opname == "LOAD_GLOBAL" and steps[i - 1].argval == "isinstance"
        names: list[str] = []
        for after in steps[i + 1 :]:
            if after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            names.append(after.argval)
        for k in range(1, len(names)):
            fact = asked if k + 1 == len(names) else names[k + 1] in FACTS
            yield Read(tuple(names[:k]), names[k], not fact)
        if names:
            yield Read(tuple(names), "", not asked)


WRITERS = (
    "reset",
    "init",
    "load",
    "save",
    "tie",
    "resize",
    "set",
    "get",
    "register",
    "add",
    "remove",
    "prune",
    "freeze",
)
"""Beginnings of the names of methods that change a module or hand out its parts."""


def other_readers(kind: type[nn.Module]) -> dict[str, tuple[FunctionType, list[Read]]]:
    """The public methods of a class, besides forward, that only read what is taken as `self.<name>`, and what they take.

    Told from their code: none that stores an attribute, uses `.data` or something of a name with "_" at its end.
    """
    found = {}
    for name in {n for c in kind.__mro__ if not c.__module__.startswith("torch.nn.") for n in c.__dict__}:
        function = inspect.getattr_static(kind, name)
        if name.startswith(("_", *WRITERS)) or name == "forward" or not isinstance(function, FunctionType):
            continue
        code = inspect.unwrap(function).__code__
        writes = any(step.opname == "STORE_ATTR" for step in dis.get_instructions(code))
        if not writes and not any(n == "data" or n.endswith("_") for n in code.co_names):
            reads = list(chains(code))
            if reads:
                found[name] = function, reads
    return found


def read_hosts(module: nn.Module) -> dict[tuple[str, ...], Host]:
    """Path -> layer inside `module` that is changed (or kept in another form), and that the module's own code reads."""
    kind = module.base_class if isinstance(module, Host) else type(module)
    found: dict[tuple[str, ...], Host] = {}
    reads = reads_in(kind) if module._modules else {}
    if not reads:
        return found
    for first, child in module._modules.items():
        for read in reads.get(first, ()):
            layer = child
            for name in read.path[1:]:
                layer = None if layer is None else layer._modules.get(name)
            if isinstance(layer, Host) and is_read(layer, read):
                found[read.path] = layer
    return found


def is_read(layer: Host, read: Read) -> bool:
    """Whether `read` takes more from `layer` than a call gives: a weight, or a method that may use one."""
    if FORMS in layer._modules and read.site in layer.held_names():
        return True
    if not read.values or (not read.site and not never_called(layer)):
        return False
    method = getattr(layer.base_class, read.site, None) if read.site not in ("", "forward") else None
    own = isinstance(method, FunctionType) and not hasattr(nn.Module, read.site)
    taken = own or read.site in layer._parameters or never_called(layer)
    return taken and bool(layer.adapters._modules or layer.adapters.tied)


def never_called(layer: Host) -> bool:
    """Whether a module has no forward at all (nn.ParameterDict), so that it can only be read."""
    return layer.base_class.forward is nn.Module.forward


def written_in(twin: nn.Module, layers: dict[tuple[str, ...], Host], dropout: bool) -> nn.Module:
    """`twin`, a shell of its own, with the layers at these paths replaced by plain ones that hold W + ΔW."""
    for path, layer in layers.items():
        at = twin
        for name in path[:-1]:
            inner = at._modules[name]
            assert inner is not None
            inner = shell(inner, type(inner), {})
            at.__dict__["_modules"] = {**at._modules, name: inner}
            at = inner
        at.__dict__["_modules"] = {**at._modules, path[-1]: plain(layer, dropout)}
    return twin


def plain(layer: Host, dropout: bool) -> nn.Module:
    """A twin of an adapted layer, of its plain class, that holds W + ΔW."""
    sites = layer.active_sites().union(layer.held_names())
    tensors: dict[str, Tensor | None] = {s: layer.changed(s, dropout=dropout) for s in sites - set(layer._buffers)}
    buffers: dict[str, Tensor | None] = {s: layer.changed(s) for s in sites & set(layer._buffers)}
    return shell(layer, layer.base_class, tensors, buffers)
