"""Labelled recordings for training: a folder of signal files, or a folder with one folder of audio files per class.

DIR/train.safetensors, validation.safetensors, test.safetensors        (`signals_file`, `deltaw data gw`)
DIR/[train|validation|test/]CLASS/*.wav, *.flac, *.ogg, *.mp3          (the layout of HF's audiofolder)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.errors import DataError, MissingExtra
from deltaw.training.config import DataConfig
from deltaw.training.order import generator
from deltaw.training.rows import SPLITS, by_split, part_of, to_score
from deltaw.training.signals_file import Signals, read_signals

Array = np.ndarray[Any, Any]
Labelled = tuple[Path, str]
"""A file and its class."""
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
RATE = 16_000
LOUDEST = 1e12
"""The energy of a louder sample may overflow float32."""


def read_sounds(data: DataConfig, seed: int, seconds: float | None = None) -> tuple[dict[str, Signals], list[str]]:
    """Split -> signals, and facts for the log. Missing splits are cut from the training part with `seed`.

    seconds: audio files are cut or padded to this length; None for the longest of them (at most 30).

    Raises:
        DataError: nothing is there, a file is unreadable, or there is one class only.
    """
    found, notes, made = _source(data, seconds, distinct=True)
    if data.split is not None:
        found = {"train": part_of(found, str(data.path), data.split)}
    if "train" not in found:
        raise DataError(f"{data.path}: no train split (found {', '.join(found) or 'nothing usable'})")
    names = found["train"].names
    for name, share in (("test", 0.0 if made else data.test), ("validation", data.validation)):
        if name not in found and share > 0:
            found[name], found["train"] = _cut(found["train"], share, generator("split", seed, name))
    if data.limit is not None:
        found["train"] = found["train"][: data.limit]
    for name in ("train", "validation"):
        part = found[name]
        counts = Counter(part.labels.tolist())
        if len(part) == 0 or (name == "train" and len(counts) < 2):
            raise DataError(
                f"{data.path}: {name} has {len(part):,} examples of {len(counts)} classes; two classes are needed"
                + "".join(f" ({note})" for note in notes if note.startswith("dropped"))
            )
    order = [name for name in ("train", "validation", "test") if name in found]
    for name in order:
        counts = Counter(found[name].labels.tolist())
        classes = ", ".join(f"{label} {counts[i]:,}" for i, label in enumerate(names))
        notes.append(f"{name}: {len(found[name]):,} examples ({classes})")
    return {name: found[name] for name in order}, notes


def sounds_to_score(data: DataConfig, seconds: float | None = None) -> tuple[str, Signals, list[str]]:
    """(name, signals, facts for the log) of what `to_score` takes of `data`, equal ones as often as they come.

    seconds, errors: as `read_sounds`.
    """
    found, notes, _ = _source(data, seconds, distinct=False)
    name, parts = to_score(found, str(data.path), data.split)
    joined = replace(
        parts[0],
        waves=np.concatenate([part.waves for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        columns={},
    )
    return name, joined, [*notes, f"{name}: {len(joined):,} examples"]


def _source(data: DataConfig, seconds: float | None, *, distinct: bool) -> tuple[dict[str, Signals], list[str], bool]:
    """The splits that are there, facts for the log, and whether they are files of signals.

    distinct: of equal audio files one is taken, and nothing that another split has.
    """
    if data.path is None:
        raise DataError(
            "no data: set data=FOLDER (`deltaw data gw --out FOLDER` makes one; or a folder with a folder of audio files per class)"
        )
    folder = Path(data.path).expanduser()
    if not folder.is_dir():
        raise DataError(f"data={data.path}: no such folder; `deltaw data gw --out {data.path}` makes one")
    files = by_split(p for p in folder.iterdir() if p.suffix.lower() == ".safetensors")
    notes = [f"data: {data.path}"]
    found = (
        {name: read_signals(path) for name, path in files.items()}
        if files
        else _folders(folder, seconds, notes, distinct=distinct)
    )
    if len({(part.waves.shape[1:], part.rate, tuple(part.names)) for part in found.values()}) > 1:
        raise DataError(f"{folder}: {' and '.join(found)} differ in length, channels, rate or classes")
    return found, notes, bool(files)


def read_sound(path: Path, rate: float, samples: int, channels: int) -> Array:
    """One recording as (channels, samples) at `rate`, cut or padded with zeros.

    Raises:
        DataError: it is unreadable or empty, or has another number of channels (one channel is copied to all of them).
    """
    if path.suffix == ".npy":
        waves = np.atleast_2d(np.load(path, allow_pickle=False)).astype(np.float32)
        own = rate
        _check_finite(waves, path)
    else:
        waves, own = _audio(path)
    if waves.shape[-1] == 0:
        raise DataError(f"{path}: holds no samples")
    waves = _at_rate(waves, own, rate)
    if channels == 1 and len(waves) > 1:
        waves = waves.mean(axis=0, keepdims=True)
    if len(waves) == 1 and channels > 1:
        waves = np.repeat(waves, channels, axis=0)
    if len(waves) != channels:
        raise DataError(f"{path}: {len(waves)} channels, {channels} are needed")
    waves = waves[:, :samples]
    return np.pad(waves, ((0, 0), (0, samples - waves.shape[1])))


def _folders(folder: Path, seconds: float | None, notes: list[str], *, distinct: bool) -> dict[str, Signals]:
    parts = by_split(p for p in folder.iterdir() if p.is_dir()) or {"train": folder}
    listed = {
        split: [(file, one.name) for one in sorted(part.iterdir()) if one.is_dir() for file in sorted(one.rglob("*"))]
        for split, part in parts.items()
    }
    listed = {split: [(f, c) for f, c in files if f.suffix.lower() in AUDIO] for split, files in listed.items()}
    names = sorted({label for files in listed.values() for _, label in files})
    if len(names) < 2:
        raise DataError(
            f"{folder}: no train.safetensors, and audio files ({', '.join(AUDIO)}) of {len(names)} classes; "
            "wanted: one folder of audio files per class"
        )
    dropped: Counter[str] = Counter()
    if distinct:
        listed = _distinct(listed, dropped)
    read: dict[str, list[tuple[Array, int]]] = {}
    for split, files in listed.items():
        read[split] = []
        for file, label in files:
            try:
                waves, own = _audio(file)
            except DataError:
                dropped["unreadable"] += 1
                continue
            if waves.shape[1] == 0:
                dropped["empty"] += 1
                continue
            read[split].append((_at_rate(waves, own, RATE).mean(axis=0), names.index(label)))
    if not any(read.values()):
        raise DataError(f"{folder}: none of its audio files can be read")
    longest = max(len(wave) for rows in read.values() for wave, _ in rows)
    samples = min(longest, 30 * RATE) if seconds is None else round(seconds * RATE)
    cut = sum(len(wave) > samples for rows in read.values() for wave, _ in rows)
    if cut:
        dropped[f"(only their ends beyond {samples / RATE:g} s)"] = cut
    if dropped := +dropped:
        notes.append("dropped: " + ", ".join(f"{n:,} {why}" for why, n in dropped.items()))
    return {
        split: Signals(
            waves=np.stack([np.pad(w[:samples], (0, max(0, samples - len(w))))[None] for w, _ in rows]),
            labels=np.array([label for _, label in rows]),
            rate=float(RATE),
            names=names,
            channels=["sound"],
        )
        for split, rows in read.items()
        if rows
    }


def _distinct(listed: dict[str, list[Labelled]], dropped: Counter[str]) -> dict[str, list[Labelled]]:
    """Every content once, with its one class; what a held-out split has is not trained on."""
    claimed: set[str] = set()
    kept: dict[str, list[Labelled]] = {split: [] for split in listed}
    for split in (name for name in SPLITS if name in listed):
        equal: dict[str, list[Labelled]] = {}
        for file, label in listed[split]:
            equal.setdefault(_content(file), []).append((file, label))
        for content, same in equal.items():
            if content in claimed:
                dropped["also in another split"] += len(same)
                continue
            dropped["duplicate"] += len(same) - 1
            if len({label for _, label in same}) > 1:
                dropped["with contradicting labels"] += 1
                continue
            claimed.add(content)
            kept[split].append(same[0])
    return kept


def _content(file: Path) -> str:
    """What tells two files apart: the sha256 of their bytes, or their names where they have none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return str(file)


def _audio(path: Path) -> tuple[Array, float]:
    """(channels, samples) and the rate of an audio file, all of it finite; maybe without samples."""
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtra("audio files need soundfile: pip install soundfile") from error
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        waves, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DataError(f"{path}: cannot be read as audio ({error})") from error
    _check_finite(waves, path)
    return waves.T, float(rate)


def _check_finite(waves: Array, path: Path) -> None:
    """Refuse what has no spectrogram of finite numbers."""
    if not (np.abs(waves) <= LOUDEST).all():  # NaN is not below anything either
        raise DataError(f"{path}: holds NaN or infinity, or samples beyond {LOUDEST:g}, where full scale is 1")


def _at_rate(waves: Array, own: float, rate: float) -> Array:
    if own == rate:
        return waves
    import torch

    from deltaw.training.log_mel import resample

    return resample(torch.from_numpy(np.ascontiguousarray(waves)), max(1, round(waves.shape[1] * rate / own))).numpy()


def _cut(part: Signals, share: float, random: np.random.Generator) -> tuple[Signals, Signals]:
    """(held out, rest): `share` of every class."""
    held: list[int] = []
    for label in range(len(part.names)):
        own = np.flatnonzero(part.labels == label)
        held += random.permutation(own)[: max(1, round(share * len(own))) if len(own) > 1 else 0].tolist()
    rest: Sequence[int] = sorted(set(range(len(part))) - set(held))
    return part[np.array(sorted(held), dtype=int)], part[np.array(rest, dtype=int)]
