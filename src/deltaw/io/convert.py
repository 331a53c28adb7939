"""Convert: an adapter in one tool's format -> another's, without loss, or refused with the reason.

Where the target cannot say it, `rank` asks for the nearest plain LoRA instead, whose error is stated; `reader` writes for a
server that knows one rank and alpha.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError
from deltaw.io import files
from deltaw.io.admission import admit, check_values, over_any_base
from deltaw.io.extraction import approximate
from deltaw.io.folder import MANIFEST, sync
from deltaw.io.formats import Hints, format_named, formats, guess
from deltaw.io.notices import AdapterNotice
from deltaw.io.readers import uniform, verdict


def read_any(
    source: str | os.PathLike[str], hints: Hints | None = None, *, kind: str | None = None, verify: bool = True
) -> Adapter:
    """The adapter in `source`, of whatever known format (`kind` says which, if it cannot be guessed).

    Raises:
        AdapterError: no known format, damaged, or a hint is missing.
    """
    path, hints = Path(source), hints or Hints()
    if kind in (None, "peft") and path.is_dir() and not _is_mlx(path):
        admitted = admit(path, verify=verify, shapes=hints.shapes)
        for note in admitted.notes:
            warnings.warn(note, AdapterNotice, stacklevel=2)
        return over_any_base(admitted)
    if not path.exists():
        raise AdapterError(f"there is no file or folder {path}")
    found = format_named(kind) if kind is not None else guess(path)
    if found is None:
        raise AdapterError(
            f"{path} is of no format that is known by its look: say which (--from {' | '.join(formats())})"
        )
    return found.read(path, hints)


def _is_mlx(path: Path) -> bool:
    return (path / "adapters.safetensors").is_file() and not (path / MANIFEST).is_file()


def convert(
    adapter: Adapter,
    to: str,
    out: str | os.PathLike[str],
    hints: Hints | None = None,
    *,
    rank: int | None = None,
    reader: str | None = None,
    one_rank: bool = False,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    added: Collection[str] = (),
) -> Adapter:
    """Write `adapter` to `out` in the format `to`; returns what was written.

    rank: approximate what the format cannot say by LoRAs of that rank. reader: write for that server. one_rank: one
    rank and every scale inside B (as for a server). base: for approximations of methods that depend on it. added: parameters
    that the base does not have, whose copies stay as they are.

    Raises:
        AdapterError: the format cannot say it; `out` exists; a hint is missing.
    """
    path, hints = Path(out), hints or Hints()
    if rank is not None:
        adapter = approximate(adapter, rank, base, added=added)
    if (reader is not None and reader != "peft" and not verdict(adapter, reader).fine) or one_rank:
        adapter = uniform(adapter)
    if reader is not None:
        left = verdict(adapter, reader)
        if not left.fine:
            raise AdapterError(f"{reader} would not read it: {'; '.join((*left.refuses, *left.misreads))}. {left.cure}")
    check_values(adapter.tensors())
    if to == "peft":
        files.write(adapter, path, grammar="PEFT")
        return adapter
    chosen = format_named(to)
    reason = chosen.cannot(adapter)
    if reason is not None:
        raise AdapterError(
            f"{to} cannot say this adapter: {reason}. rank= (--rank N) writes the nearest plain LoRA with its error, "
            f"and the format 'safetensors' says everything"
        )
    if chosen.suffix and path.suffix != chosen.suffix:
        raise AdapterError(f"--out {path}: {to} files end with {chosen.suffix}")
    if path.exists():
        raise AdapterError(f"{path} exists: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.converting-{secrets.token_hex(6)}{path.suffix}")
    try:
        chosen.write(adapter, draft, hints)
        for each in [*(draft.iterdir() if draft.is_dir() else ()), draft]:
            sync(each)
        os.rename(draft, path)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        draft.unlink(missing_ok=True)
    return adapter
