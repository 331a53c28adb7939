"""Checkpoints that are either whole or not there: written aside, flushed, listed with sha256, renamed.

    step-120/  trained.safetensors   the trained tensors, by name
               best.safetensors      those of the best epoch so far
               optimizer.safetensors its tensors; random.safetensors the generators' states
               state.json            step, epoch, batches done, history ...
               MANIFEST.json         name -> bytes and sha256 of the above, versions, digest of the configuration

No pickle. `newest` walks from the newest to the oldest and says why it skipped one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load
from torch import Tensor

from deltaw.errors import DataError
from deltaw.io import tensor_file
from deltaw.ops import compiled

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: groups of tensors, and JSON."""

    tensors: Mapping[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    digest: str,
    keep: int,
) -> Path:
    """Write `folder`/step-N atomically, then remove all but the newest `keep`.

    Raises:
        OSError: the disk is full or unwritable. What was there before is still there, whole.
    """
    final, needed = folder / f"step-{step}", sum(t.nbytes for group in tensors.values() for t in group.values())
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"step-{step}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir()
        listed = {}
        for name, group in tensors.items():
            listed[f"{name}.safetensors"] = _write_flushed(aside / f"{name}.safetensors", group)
        listed["state.json"] = _write_flushed(aside / "state.json", json.dumps(dict(state)).encode())
        manifest = {"step": step, "config": digest, "versions": versions(), "files": listed}
        _write_flushed(aside / MANIFEST, json.dumps(manifest, indent=2).encode())
        flush_folder(aside)
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
        flush_folder(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: the checkpoint of step {step} needs {needed:,} bytes in {folder}, "
                f"{free:,} are free on its disk; earlier checkpoints stay: make room, then resume",
            ) from error
        raise
    for _, old in _by_step(folder)[keep:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> tuple[Checkpoint | None, dict[str, Any], list[str]]:
    """The newest whole checkpoint (None if there is none), its manifest, and why newer ones were skipped."""
    skipped = []
    for _, path in _by_step(folder):
        try:
            checkpoint, manifest = read(path)
        except DataError as error:
            skipped.append(str(error))
            continue
        return checkpoint, manifest, skipped
    return None, {}, skipped


def read(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """One checkpoint and its manifest, every byte verified.

    Raises:
        DataError: a file is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = {}
        for name, expected in manifest["files"].items():
            content = (path / name).read_bytes()
            if len(content) != expected["bytes"]:
                raise DataError(
                    f"{path.name}: {name} has {len(content):,} bytes, its manifest says {expected['bytes']:,}"
                )
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise DataError(f"{path.name}: {name} is not what its manifest lists (sha256 differs)")
            files[name] = content
        state = json.loads(files.pop("state.json"))
        tensors = {Path(name).stem: load(content) for name, content in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path.name}: unreadable ({type(error).__name__}: {error})") from error
    return Checkpoint(tensors, state), manifest


def versions() -> dict[str, str]:
    """What bit identity depends on besides the machine."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "deltaw": version("deltaw"),
        "sweeps": compiled.level(),
    }


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        _write_flushed(aside, content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: str) -> None:
    """As `write_atomic`, but not flushed to the disk: for marks that are written often and may be lost with the power."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    aside.write_text(content)
    os.replace(aside, path)


def open_modes(folder: Path) -> None:
    """Give the files in `folder` the usual mode: safetensors writes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@dataclass
class _Counted:
    """A file in front of which bytes are counted and hashed, so that no copy of them need be kept for it."""

    file: BinaryIO
    digest: Any
    size: int = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _write_flushed(path: Path, content: bytes | Mapping[str, Tensor]) -> dict[str, Any]:
    """Write `content`, tensors one after the other as safetensors, and what the manifest says of it."""
    with path.open("wb") as file:
        counted = _Counted(file, hashlib.sha256())
        if isinstance(content, bytes):
            counted.write(content)
        else:
            tensor_file.write(counted, content, {})
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": counted.size, "sha256": counted.digest.hexdigest()}


def flush_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut (where the system can)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder say so
            raise
    finally:
        os.close(handle)


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(p.name.removeprefix("step-"), p) for p in folder.iterdir() if p.name.startswith("step-")]
    return sorted(((int(n), p) for n, p in found if n.isdigit()), reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    if folder.is_dir():
        for path in folder.iterdir():
            if ".tmp-" in path.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
