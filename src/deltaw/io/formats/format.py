"""A format reads a path into an adapter and writes an adapter to a path; what the file does not say comes as hints."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError, did_you_mean
from deltaw.io import strict_json, tensor_file
from deltaw.io.admission import check_values
from deltaw.io.folder import Folder


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the user adds where a format leaves it out.

    alpha: numerator of the scale, for formats without one. shapes: the base's parameters (name -> stored shape), where
    names were flattened or a layer's kind is not told. base: facts of the base's config (model_type, heads ...).
    component: the part of a pipeline ("unet", "text_encoder") that is meant or that the adapter belongs to.
    enabled: which parts of a fused projection a MergedLinear adapts.
    """

    alpha: float | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    component: str | None = None
    enabled: tuple[bool, ...] | None = None


class Format(ABC):
    """One format. A file in this folder ends with `FORMAT = ...`, and is found by that."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    """Of the files it writes; "" for folders."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether `path` looks like this format. Reads names only."""

    @abstractmethod
    def read(self, path: Path, hints: Hints) -> Adapter:
        """The adapter in `path`.

        Raises:
            AdapterError: damaged, foreign, or a hint is missing; the message says which.
        """

    @abstractmethod
    def cannot(self, adapter: Adapter) -> str | None:
        """Why the format cannot say `adapter` without loss, or None."""

    @abstractmethod
    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        """Write `adapter`; only one that it can say. `path` is a new draft, put in place by the caller."""


def formats() -> dict[str, Format]:
    """All of them by name."""
    package = importlib.import_module("deltaw.io.formats")
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        made = getattr(importlib.import_module(f"deltaw.io.formats.{module}"), "FORMAT", None)
        if made is not None:
            found[made.name] = made
    return found


def format_named(name: str) -> Format:
    """The format called `name`.

    Raises:
        AdapterError: there is none.
    """
    known = formats()
    if name not in known:
        raise AdapterError(f"no format {name!r}{did_you_mean(name, known)} (known: peft, {', '.join(known)})")
    return known[name]


def guess(path: Path) -> Format | None:
    """The format that `path` looks like, or None."""
    return next((f for f in formats().values() if f.recognises(path)), None)


# ---- what the readers and writers share


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of one safetensors file, checked.

    Raises:
        AdapterError: no such file, a pickle, a link, damaged.
        NonFinite: a tensor holds NaN or infinity.
    """
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".lora", ".pkl"):
        raise AdapterError(
            f"{path} is a pickle, which can run code and is never read here. In a place you trust: "
            f"safetensors.torch.save_file(torch.load(path, weights_only=True), 'new.safetensors')"
        )
    raw = Folder(path.parent).read(path.name)
    header = tensor_file.read_header(memoryview(raw), path.name)
    tensors = tensor_file.read_tensors(memoryview(raw), header)
    check_values(tensors)
    return tensors, dict(header.metadata)


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, unchecked; empty if it is none."""
    if path.suffix != ".safetensors" or not path.is_file() or path.is_symlink():
        return {}
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > tensor_file.MAX_HEADER:
            return {}
        raw = stream.read(length)
    try:
        return strict_json.parse(raw, "header", tensor_file.MAX_HEADER)
    except AdapterError:
        return {}


def names_in(path: Path) -> set[str]:
    """The tensor names of a safetensors file; empty if it is none."""
    return set(header_of(path)) - {"__metadata__"}


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, unchecked."""
    found = header_of(path).get("__metadata__")
    return found if isinstance(found, dict) else {}


def write_tensors(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file."""
    tensor_file.write(stream, {k: t.detach().contiguous() for k, t in tensors.items()}, metadata)


def lora(A: Tensor, B: Tensor, alpha: float, m: Tensor | None = None, **more: Any) -> Change:
    """A LoRA (or, with `m`, DoRA) change with scale alpha/rank; A (rank, in), B (out, rank), m (out,).

    Raises:
        AdapterError: the shapes do not fit together.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.is_floating_point():
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no low-rank factors")
    tensors = {"A": A.contiguous(), "B": B.contiguous()}
    if m is not None:
        tensors["m"] = m.reshape(-1).contiguous()
    try:
        change = Change(variants["lora" if m is None else "dora"](rank=A.shape[0], alpha=float(alpha)), tensors, **more)
        _ = change.matrix_shape
    except ValueError as error:
        raise AdapterError(str(error)) from error
    return change


def only(adapter: Adapter, kinds: tuple[str, ...], layers: tuple[str, ...] | None = None) -> str | None:
    """The reason why an adapter has more than these methods and layer families, or None."""
    for key, change in adapter.changes.items():
        if change.variant.kind not in kinds:
            return f"{key} is changed by {change.variant.kind}, and the format has only {', '.join(kinds)}"
        if change.variant.kind in ("lora", "dora") and change.tensors["A"].ndim != 2:
            return f"{key} is a stack of weights, which the format does not have"
        if layers is not None and change.layer not in (None, *layers):
            return f"{key} belongs to a layer of the family {change.layer!r}, which the format does not have"
        if change.tied:
            return f"{key} is one parameter with {change.tied[0]!r}; the format changes one of the two"
        if "[" in key:
            return f"{key} is a part of a weight, which the format does not have"
    return None


LINEAR = ("linear", "linear (own forward)", "conv1d_gpt2")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def module_of(key: str) -> str:
    """The module behind a weight's name.

    Raises:
        AdapterError: it is no module's weight.
    """
    path, _, site = key.rpartition(".")
    if site != "weight" or not path:
        raise AdapterError(f"the format changes weights of modules only, not {key!r}")
    return path


def exactly(value: float) -> Tensor:
    """A scalar tensor that holds `value`: fp32 where that is exact, else fp64."""
    short = torch.tensor(value, dtype=torch.float32)
    return short if float(short) == value else torch.tensor(value, dtype=torch.float64)
