"""Targets: which layers a pattern means. Every pattern must match something, and every match must be adaptable.

A pattern is a dotted suffix ("query_proj", "layer.0.attention.query_proj"), a regular expression that matches the whole
path or a dotted end of it ("layer\\.[0-5]\\..*query"), a module class, a predicate `(path, module) -> bool`, or
"all-linear". A text that matches no layer may name parameters ("experts.gate_up_proj"), and one that ends in rows means
these parts of a fused weight ("qkv[0:64,128:192]"). `train=` takes exact dotted suffixes only: "head" never means "subhead".
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from deltaw.core.adapter import join_key
from deltaw.core.host import Host
from deltaw.core.registry import hosts as host_registry
from deltaw.errors import TargetError
from deltaw.model.state import layers_of as layers_of
from deltaw.model.state import parameters_of

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool]
ALL_LINEAR = "all-linear"
PARTS = re.compile(r"(.+)\[(\d+:\d+(?:,\d+:\d+)*)\]")
PLAIN = re.compile(r"[\w.\-]+")
HEADS = ("score", "classifier", "qa_outputs", "classification_head")


def as_targets(targets: Any) -> list[Target]:
    """One target or several -> a list, checked to be of a kind that we know."""
    if not (isinstance(targets, (str, type, list, tuple, set)) or callable(targets)):
        raise TargetError(
            f"targets={targets!r} is a {type(targets).__name__}: use a name, a regex, a class, a function or a list"
        )
    found = [targets] if isinstance(targets, (str, type)) or callable(targets) else list(targets)
    if not found:
        raise TargetError('targets=[] adapts nothing: name layers, or pass targets="all-linear"')
    for target in found:
        if not (isinstance(target, (str, type)) or callable(target)):
            raise TargetError(
                f"target {target!r} is a {type(target).__name__}: use a name, a regex, a class or a function"
            )
    return found


def named(text: str, paths: Iterable[str]) -> list[str]:
    """The paths that a textual target stands for: itself or the pattern is a dotted end of them, or all of them.

    Raises:
        TargetError: it is no valid regular expression.
    """
    if PLAIN.fullmatch(text):
        end = "." + text
        return [path for path in paths if path.endswith(end) or path == text]
    try:
        return list(filter(re.compile(rf"(?:.*\.)?(?:{text})").fullmatch, paths))
    except re.error as error:
        raise TargetError(f"target {text!r} is no valid regular expression: {error}") from error


def matching(model: nn.Module, target: Target, layers: dict[str, nn.Module], leave: Iterable[str] = ()) -> list[str]:
    """The paths that one target means, in the model's order.

    Raises:
        TargetError: none, or a layer that cannot be adapted; the message holds the nearest names.
    """
    left = set(leave)
    if target == ALL_LINEAR:
        head = output_head(model)
        found = [p for p, m in layers.items() if p and p not in left and m is not head and is_linear(m) and host_for(m)]
        found = [p for p in found if not belongs_to_parent(p, layers)]
        if not found:
            itself = ", and a layer that is the model itself is named by its class (targets=torch.nn.Linear)"
            raise TargetError(
                f"targets='all-linear': {type(model).__name__} has no linear layer besides its output head"
                + (itself if host_for(model) else ": name other layers, for example by class (targets=torch.nn.Conv2d)")
            )
        return found
    if isinstance(target, str):
        found = named(target, layers)
    elif isinstance(target, type):
        found = [p for p, m in layers.items() if isinstance(m, target)]
    else:
        found = [p for p, m in layers.items() if target(p, m)]
    if not found:
        raise TargetError(f"{describe(target)} matches no layer of {type(model).__name__}; {nearest(target, layers)}")
    return [p for p in found if p not in left]


def exact(model: nn.Module, name: str, layers: dict[str, nn.Module]) -> list[str]:
    """The paths of the modules that `name` means as a dotted suffix.

    Raises:
        TargetError: there is none; the message holds the nearest names.
    """
    found = [p for p in layers if p == name or p.endswith("." + name)]
    if not found:
        pattern = "" if PLAIN.fullmatch(name) else " (train= takes exact names, no patterns: list them)"
        raise TargetError(
            f"train={name!r} matches no module of {type(model).__name__}{pattern}; {nearest(name, layers)}"
        )
    return found


def host_for(layer: nn.Module) -> type[Host] | None:
    """The host that adapts `layer` with matrix variants, or None. Later registrations win, so plugins may refine ours."""
    if isinstance(layer, Host):
        host: type[Host] = layer.host
        return None if host.full_only else host
    return next((cls for cls in askable(len(host_registry), type(layer)) if cls.accepts(layer)), None)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def askable(registered: int, kind: type) -> tuple[type[Host], ...]:
    """The hosts, of so many that are `registered`, that may accept a layer of class `kind`; later registrations first."""
    hosts = (cls for _, cls in reversed(host_registry.items()) if not cls.full_only)
    return tuple(cls for cls in hosts if cls.accepts_class(kind))


def parts_of(target: Target) -> tuple[Target, tuple[tuple[int, int], ...]]:
    """A target and the rows it means: "qkv[0:64,128:192]" -> ("qkv", ((0, 64), (128, 192))); no rows: all of them."""
    found = PARTS.fullmatch(target) if isinstance(target, str) else None
    if found is None:
        return target, ()
    rows = [tuple(map(int, p.split(":"))) for p in found.group(2).split(",")]
    return found.group(1), tuple((a, b) for a, b in rows)


def parameters(target: Target, layers: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """(path, name) of the parameters that a text names as it would name a layer."""
    if not isinstance(target, str):
        return []
    keys = {join_key(path, site): (path, site) for path, _, site, _ in parameters_of(layers)}
    return [keys[key] for key in named(target, keys)]


def host_for_parameter(layer: nn.Module, site: str) -> type[Host] | None:
    """The host that adapts one parameter of `layer` with matrix variants, or None: its family's, or that of last resort."""
    if isinstance(layer, Host):
        own: type[Host] = layer.host
        return own if site in own.sites(layer) else None
    host = host_for(layer) or watcher_of(layer) or host_of_any(layer)
    return host if site in host.sites(layer) else None


def watcher_of(layer: nn.Module) -> type[Host] | None:
    """The host for a module that reads the weights of layers inside it, or None."""
    return next(
        (cls for _, cls in reversed(host_registry.items()) if cls.watches and isinstance(layer, cls.watches)), None
    )


def reader_of(layer: nn.Module) -> type[Host] | None:
    """The host for a module that reads weights of hosts inside it (`Host.reads`), or None."""
    return next((cls for cls in readers(len(host_registry), type(layer)) if cls.reads(layer)), None)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def readers(registered: int, kind: type) -> tuple[type[Host], ...]:
    """The hosts, of so many that are `registered`, that may say so of a module of class `kind`; later registrations first."""
    return tuple(cls for _, cls in reversed(host_registry.items()) if cls.reads_class(kind))


def host_of_any(layer: nn.Module) -> type[Host]:
    """The host of last resort, which trains a module of any class in full."""
    return next(cls for _, cls in host_registry.items() if cls.full_only)


def is_linear(layer: nn.Module) -> bool:
    """nn.Linear and what computes like it (GPT-2's Conv1D), for "all-linear"."""
    kind = layer.base_class if isinstance(layer, Host) else type(layer)
    return isinstance(layer, nn.Linear) or kind.__name__ == "Conv1D"


def belongs_to_parent(path: str, layers: dict[str, nn.Module]) -> bool:
    """True for `out_proj` of nn.MultiheadAttention, whose weight its parent reads without calling it."""
    parent, _, name = path.rpartition(".")
    return name == "out_proj" and isinstance(layers.get(parent), nn.MultiheadAttention)


def output_head(model: nn.Module) -> nn.Module | None:
    """The output layer of a transformers model (as PEFT, "all-linear" leaves it out), or None for other models."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        head = None
    if head is None and "ForSequenceClassification" in type(model).__name__:
        head = next((getattr(model, n) for n in HEADS if isinstance(getattr(model, n, None), nn.Linear)), None)
    return head if isinstance(head, nn.Module) else None


def describe(target: Target) -> str:
    """How a target is written in messages."""
    name = repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))
    return f"targets={name}"


def nearest(target: Target, layers: dict[str, nn.Module]) -> str:
    """The names nearest to a target that matches nothing, or the adaptable names there are."""
    ends: dict[str, None] = {}
    for path, module in layers.items():
        if (
            path
            and (not any(True for _ in module.children()) or host_for(module))
            and any(True for _ in module.parameters(False))
        ):
            ends.setdefault(path.rpartition(".")[2])
            ends.setdefault(path)
    names = list(ends)
    word = target if isinstance(target, str) else getattr(target, "__name__", "")
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
    if close:
        return f"closest: {', '.join(map(repr, close))}"
    short = [n for n in names if "." not in n and not n.isdigit()] or names
    return f"its layers are called {', '.join(map(repr, short[:8]))}" + (" ..." if len(short) > 8 else "")


def in_layers(paths: Sequence[str], wanted: Sequence[int] | range | None) -> list[str]:
    """Those paths whose first number (the index of their block) is in `wanted`; all of them if that is None."""
    if wanted is None:
        return list(paths)
    numbers = set(wanted)
    return [p for p in paths if (m := re.search(r"(?:^|\.)(\d+)(?:\.|$)", p)) and int(m.group(1)) in numbers]
