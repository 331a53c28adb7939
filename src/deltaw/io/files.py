"""`read` and `write`: an adapter as a value, from and to a folder. No model is needed."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from deltaw.core.adapter import Adapter, Change, check_adapter
from deltaw.errors import AdapterError
from deltaw.io import manifest, strict_json, tensor_file
from deltaw.io.admission import admit, check_values, over_any_base
from deltaw.io.folder import CARD, CONFIG, MANIFEST, WEIGHTS, replace
from deltaw.io.notices import AdapterNotice
from deltaw.io.peft import grammar_for, grammar_of
from deltaw.io.peft.places import registered


def read(path: str | os.PathLike[str], *, verify: bool = True) -> Adapter:
    """The adapter in the folder `path` (PEFT's, ours, or any that PEFT's tools wrote), checked by `admission`.

    verify: False accepts files that were edited since deltaw wrote them; every other check stays.

    Raises:
        AdapterError: the folder is damaged, foreign, incomplete, or cannot be said here.
        NonFinite: a tensor holds NaN or infinity.
    """
    admitted = admit(path, verify=verify)
    for note in admitted.notes:
        warnings.warn(note, AdapterNotice, stacklevel=2)
    return over_any_base(admitted)


def write(
    adapter: Adapter, path: str | os.PathLike[str], *, grammar: str | None = None, card: str | None = None
) -> Path:
    """Write `adapter` as the folder `path`: config, weights and manifest, all at once or not at all.

    grammar: None takes PEFT's words where they suffice and deltaw's own ("DELTAW") where not; "PEFT" refuses the latter.
    card: the text of a README.md.
    An existing folder is replaced if it is an adapter that deltaw wrote. Equal adapters give equal files.

    Raises:
        AdapterError: the adapter cannot be said in the grammar asked for, or `path` is something else.
        NonFinite: a tensor holds NaN or infinity.
    """
    check_adapter(adapter, "write")
    if not adapter.changes:
        raise AdapterError("the adapter is empty: there is nothing to write")
    check_values(adapter.tensors())
    adapter = adapter.replace(changes={k: adapter.changes[k] for k in registered(adapter.changes)})
    config, tensors = grammar_of(adapter, grammar).write(adapter)
    return write_parts(adapter, config, tensors, path, card)


def write_parts(
    adapter: Adapter,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    card: str | None = None,
) -> Path:
    """The folder of an adapter whose config and tensors are made already."""
    raw = strict_json.pretty(config)
    tensors = {k: t.detach() for k, t in tensors.items()}
    adapter = as_read(adapter, config, tensors)

    def fill(folder: Path) -> None:
        (folder / CONFIG).write_bytes(raw)
        metadata = {"format": "pt"}
        metadata[tensor_file.CHECKSUM] = tensor_file.checksum(raw, tensors, metadata)
        with (folder / WEIGHTS).open("wb") as file:
            hashing = _Hashing(file)
            tensor_file.write(hashing, tensors, metadata)  # type: ignore[arg-type]
        stamps: dict[str, bytes | tuple[int, str]] = {CONFIG: raw, WEIGHTS: (hashing.size, hashing.state.hexdigest())}
        (folder / MANIFEST).write_bytes(manifest.build(adapter, stamps))
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")

    return replace(path, fill)


class _Hashing:
    """A file that knows the sha256 of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.state = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.state.update(data)
        self.size += len(data)
        return self.file.write(data)


def as_read(adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """`adapter` with the tensors that reading (config, tensors) gives: what was written is read before it is kept.

    The two differ at most by the rounding of a scale that the grammar keeps inside a tensor.
    """
    shapes = {k: c.shape for k, c in adapter.changes.items() if c.shape is not None}
    back = grammar_for(config).read(config, tensors, shapes).adapter
    if set(back.changes) != set(adapter.changes):
        lost = sorted(set(back.changes) ^ set(adapter.changes))
        raise AssertionError(f"the grammar {config.get('peft_type')} does not read what it wrote: {lost[:3]}")
    return adapter.replace(changes={k: replace_tensors(adapter.changes[k], c.tensors) for k, c in back.changes.items()})


def replace_tensors(change: Change, tensors: Mapping[str, Tensor]) -> Change:
    """The same change with other tensors."""
    return Change(change.variant, tensors, change.layer, change.shape, change.tied)
