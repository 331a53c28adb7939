"""Labelled pictures of any size and colour: class folders, tables of paths, npz, MNIST's IDX files, or a hub id.

DIR/[train|validation|test/]CLASS/*.png, *.jpg ...                     (the layout of HF's imagefolder)
TABLE.csv, .jsonl, .parquet ... with a column of paths, relative to the table's folder, and a column of classes

Every picture is decoded once, before training: one that is damaged is dropped and counted, and does not end a run in its
third epoch. What tells two pictures apart is the sha256 of their content, so a copy under another name is a duplicate.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.errors import DataError, MissingExtra, did_you_mean
from deltaw.training.config import DataConfig
from deltaw.training.pictures import Pictures, read_pictures
from deltaw.training.rows import READABLE, SPLIT_NAMES, Row, by_split, read_source

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
COLUMNS = ("image", "file_name", "path", "file")
DIGITS = "digits"

Item = Path | bytes | np.ndarray[Any, Any]
"""A picture as it is kept: a file, an encoded file's bytes, or (height, width[, 3]) uint8."""


@dataclass(frozen=True)
class ImageSource:
    """What a source holds. rows: split -> rows of (data.text: key, data.label: class). items: key -> picture."""

    where: str
    rows: dict[str, list[Row]] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


def read_images(data: DataConfig) -> ImageSource:
    """All pictures of `data.path`, each looked at.

    Raises:
        DataError: the source is missing, or holds no picture. MissingExtra: pillow is not installed.
    """
    if data.path is None:
        raise DataError(
            "no data: set data=FOLDER with a folder of pictures per class, a table of paths and classes (csv, jsonl, "
            f"parquet), an npz, a hub id, or data={DIGITS} to try it"
        )
    path = Path(data.path).expanduser()
    if data.path == DIGITS:
        return _arrays(*read_pictures(None), data)
    if path.suffix.lower() == ".npz" or (path.is_dir() and any(path.glob("**/*idx3-ubyte*"))):
        return _arrays(*read_pictures(data.path, colour=True), data)
    if path.is_dir() and not _tables(path):
        return _folders(path, data)
    if path.is_dir():
        found = ImageSource(str(path))
        source, _ = (
            read_source(data)
            if "train" in {SPLIT_NAMES.get(p.stem.lower()) for p in _tables(path)}
            else (read_source(data.model_copy(update={"path": str(_tables(path)[0])})))
        )
        return _rows(found, source, path, data)
    source, where = read_source(data)
    return _rows(ImageSource(where), source, path.parent if path.is_file() else None, data)


def _tables(folder: Path) -> list[Path]:
    named = {*SPLIT_NAMES, "metadata"}
    return [p for p in sorted(folder.iterdir()) if p.suffix.lower() in READABLE and p.stem.lower() in named]


def _folders(folder: Path, data: DataConfig) -> ImageSource:
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    parts = by_split(inside) or {"train": folder}
    found = ImageSource(str(folder))
    for split, part in parts.items():
        entries: list[tuple[Item | None, Any]] = []
        for one in sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")):
            for file in sorted(p for p in one.rglob("*") if p.is_file()):
                if file.suffix.lower() in PICTURES:
                    entries.append((file, one.name))
                else:
                    found.dropped[f"with the ending {file.suffix.lower() or '(none)'}"] += 1
        _admit(found, split, entries, data)
    if not found.items:
        raise DataError(
            f"{folder}: no readable picture ({', '.join(PICTURES)}) in {len(inside)} folders"
            f"{_why(found.dropped)}; wanted: one folder of pictures per class"
        )
    return found


def _rows(found: ImageSource, source: Mapping[str, list[Row]], folder: Path | None, data: DataConfig) -> ImageSource:
    for split, rows in source.items():
        if not rows:
            raise DataError(f"{found.where} ({split}): there are no rows")
        column = data.text
        if column == COLUMNS[0]:
            column = next((name for name in COLUMNS if name in rows[0]), column)
        for key, name in (("text", column), ("label", data.label)):
            if name not in rows[0]:
                raise DataError(
                    f"{found.where} ({split}): no column {name!r} among {', '.join(map(repr, rows[0]))}: "
                    f"set data.{key}=COLUMN{did_you_mean(name, rows[0])}"
                )
        _admit(found, split, [(_item(row[column], folder), row[data.label]) for row in rows], data)
    if not found.items:
        raise DataError(f"{found.where}: no readable picture{_why(found.dropped)}")
    return found


def _item(value: Any, folder: Path | None) -> Item | None:
    """The picture of a cell: {"bytes", "path"} as `datasets` writes it, bytes, or a path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        path = Path(value.strip()).expanduser()
        return path if path.is_absolute() or folder is None else folder / path
    return value if isinstance(value, bytes) else None


def _arrays(parts: Mapping[str, Pictures], where: str, data: DataConfig) -> ImageSource:
    found = ImageSource(where)
    for split, part in parts.items():
        whole = (part.images * 255).round().astype(np.uint8)
        _admit(found, split, zip(whole, part.labels.tolist()), data)
    return found


def _admit(found: ImageSource, split: str, entries: Iterable[tuple[Item | None, Any]], data: DataConfig) -> None:
    """Look at every picture, and take in those that can be read."""
    rows: list[Row] = []
    for item, label in entries:
        try:
            key = _key(item)
            if not isinstance(item, np.ndarray) and key not in found.items:
                open_picture(item)
        except DataError:
            missing = item is None or (isinstance(item, Path) and not item.is_file())
            found.dropped["without a picture file" if missing else "not readable as a picture"] += 1
            continue
        found.items.setdefault(key, item)  # type: ignore[arg-type]
        rows.append({data.text: key, data.label: label})
    found.rows[split] = found.rows.get(split, []) + rows


def _key(item: Item | None) -> str:
    if item is None:
        raise DataError("no picture")
    if isinstance(item, Path):
        try:
            raw = item.read_bytes()
        except OSError as error:
            raise DataError(f"{item}: cannot be read ({error})") from None
    else:
        raw = item if isinstance(item, bytes) else f"{item.shape}".encode() + np.ascontiguousarray(item).tobytes()
    return hashlib.sha256(raw).hexdigest()


def open_picture(item: Item | None) -> Any:
    """The picture as a PIL image in RGB, upright.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtra("pictures need pillow: pip install pillow") from error
    if isinstance(item, np.ndarray):
        return Image.fromarray(item).convert("RGB")
    if item is None:
        raise DataError("no picture")
    name = str(item) if isinstance(item, Path) else "a picture of the data"
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: no readable image ({error})") from error


def _why(dropped: Counter[str]) -> str:
    return f" ({', '.join(f'{n:,} {why}' for why, n in dropped.items())})" if dropped else ""
