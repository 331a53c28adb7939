"""A file of labelled signals: equally long recordings of one or several channels, with what is known of each.

    NAME.safetensors  signals (n, channels, samples), float16 or float32; labels (n,), uint8; any further columns (n,)
                      metadata: JSON with rate (samples a second), labels (the classes' names), channels, about

A data set is a folder with train.safetensors, validation.safetensors and maybe test.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.errors import DataError
from deltaw.training.checkpoint import write_atomic

Array = np.ndarray[Any, Any]
FORMAT = "deltaw-signals-1"


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Recordings of the same length.

    waves: (n, channels, samples). labels: (n,), indices into `names`. rate: samples a second.
    columns: name -> (n,), what is known of each. about: JSON facts.
    """

    waves: Array
    labels: Array
    rate: float
    names: Sequence[str]
    channels: Sequence[str]
    columns: Mapping[str, Array] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | Array) -> Signals:
        return Signals(
            waves=self.waves[chosen],
            labels=self.labels[chosen],
            rate=self.rate,
            names=self.names,
            channels=self.channels,
            columns={k: v[chosen] for k, v in self.columns.items()},
            about=self.about,
        )


def write_signals(path: Path, found: Signals) -> None:
    """Write one file, whole or not at all. Two calls with equal content write equal bytes."""
    from safetensors.numpy import save

    tensors = {"signals": found.waves, "labels": found.labels.astype(np.uint8), **found.columns}
    facts = {
        "rate": found.rate,
        "labels": list(found.names),
        "channels": list(found.channels),
        "about": dict(found.about),
    }
    metadata = {FORMAT: json.dumps(facts, sort_keys=True)}  # one key: safetensors writes several in any order
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata))


def read_signals(path: Path) -> Signals:
    """One file of signals.

    Raises:
        DataError: it is missing, damaged, of another kind, or holds a value that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise DataError(f"{path}: no file of signals (its metadata lack {FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata[FORMAT])
        found = Signals(
            waves=tensors.pop("signals"),
            labels=tensors.pop("labels").astype(np.int64),
            rate=float(facts["rate"]),
            names=facts["labels"],
            channels=facts["channels"],
            columns=tensors,
            about=facts["about"],
        )
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
    if found.waves.ndim != 3 or len(found.waves) != len(found.labels) or len(found) == 0:
        raise DataError(
            f"{path}: signals are {found.waves.shape} and labels {found.labels.shape}; expected (n, channels, samples) and (n,)"
        )
    bad = np.flatnonzero(~np.isfinite(found.waves).all(axis=(1, 2)))
    if len(bad):
        raise DataError(f"{path}: {len(bad):,} signals hold NaN or infinity, the first is number {bad[0]}")
    if found.labels.max() >= len(found.names):
        raise DataError(f"{path}: label {found.labels.max()} has no name; there are {len(found.names)}")
    return found
