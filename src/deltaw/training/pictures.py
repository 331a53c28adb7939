"""Grey pictures with labels, from an npz, a folder of IDX files, the hub, or scikit-learn's digits."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.errors import DataError, MissingExtra
from deltaw.training.order import generator

Array = np.ndarray[Any, Any]
ROUNDING = 1e-6
"""How far scaled pixels may lie beyond 0 .. 1."""


@dataclass(frozen=True)
class Pictures:
    """images: (count, height, width), float32, 0 .. 1. labels: (count,), int64. unlabelled: how many more had no label."""

    images: Array
    labels: Array
    unlabelled: int = 0

    def __getitem__(self, chosen: Array | slice) -> Pictures:
        return Pictures(self.images[chosen], self.labels[chosen])


def read_pictures(source: str | None, colour: bool = False) -> tuple[dict[str, Pictures], str]:
    """ "train" and, where the source has it, "test"; and a phrase that says where they are from.

    source: an npz with x_train, y_train (x_test, y_test); a folder with MNIST's IDX files, gzipped or not; a hub id;
        None for the 1,797 real 8x8 digits that come with scikit-learn.
    colour: an npz may also hold (count, height, width, 3).

    Raises:
        DataError: the source is missing, unreadable, empty or of one class only, or its pixels are of an unknown scale.
    """
    if source is None:
        found, where = (
            sklearn_digits(),
            "scikit-learn's 1,797 digits of 8x8 (give a source for the real MNIST: npz, IDX folder or hub id)",
        )
    elif Path(source).expanduser().is_dir():
        found, where = idx_folder(Path(source).expanduser()), source
    elif Path(source).expanduser().is_file():
        found, where = npz(Path(source).expanduser(), colour), source
    elif source.endswith(".npz") or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"source={source}: no such file or folder")
    else:
        found, where = from_hub(source), source
    if unlabelled := sum(part.unlabelled for part in found.values()):
        where = f"{where} (dropped: {unlabelled:,} without label)"
    for name, part in found.items():
        if len(part.images) != len(part.labels) or len(part.labels) == 0:
            raise DataError(f"{where}: {name} has {len(part.images):,} pictures and {len(part.labels):,} labels")
    if len(np.unique(found["train"].labels)) < 2:
        raise DataError(f"{where}: all training pictures are of one class; a classifier needs at least two")
    return found, where


def split(found: Mapping[str, Pictures], validation: float, test: float, seed: int) -> dict[str, Pictures]:
    """ "train", "validation" and "test": what the source lacks is cut from its training pictures with `seed`."""
    train = found["train"]
    order = generator("split", seed).permutation(len(train.labels))
    parts = dict(found)
    for name, share in (("test", test), ("validation", validation)):
        if name not in parts and share > 0:
            count = max(1, round(share * len(train.labels)))
            parts[name], order = train[order[:count]], order[count:]
    parts["train"] = train[order]
    return {name: parts[name] for name in ("train", "validation", "test") if name in parts}


def sklearn_digits() -> dict[str, Pictures]:
    """The digits of scikit-learn's own wheel."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("the digits need scikit-learn: pip install 'deltaw[train]'") from error
    digits = load_digits()
    return {"train": Pictures((digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64))}


def npz(path: Path, colour: bool = False) -> dict[str, Pictures]:
    """x_train, y_train and maybe x_test, y_test of an npz; no pickled content is read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            lacking = {"x_train", "y_train"} - set(arrays.files)
            if lacking:
                raise DataError(f"{path}: no {' and no '.join(sorted(lacking))} among {', '.join(arrays.files)}")
            found = {"train": _pictures(arrays["x_train"], arrays["y_train"], path, colour)}
            if "x_test" in arrays.files:
                found["test"] = _pictures(arrays["x_test"], arrays["y_test"], path, colour)
            return found
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable npz ({error})") from error


def idx_folder(folder: Path) -> dict[str, Pictures]:
    """MNIST's own files, as they are distributed."""
    found = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        files = [_idx_file(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if all(files):
            found[name] = _pictures(read_idx(files[0]), read_idx(files[1]), folder)  # type: ignore[arg-type]
    if "train" not in found:
        raise DataError(f"{folder}: no train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz) there")
    return found


def _idx_file(folder: Path, name: str) -> Path | None:
    candidates = [folder / sub / n for sub in ("", "raw") for n in (name, f"{name}.gz", name.replace("-idx", ".idx"))]
    return next((p for p in candidates if p.is_file()), None)


def read_idx(path: Path) -> Array:
    """One IDX file: two zero bytes, a type (8: unsigned byte), the number of dimensions, their sizes, the data."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: damaged gzip ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path}: not an IDX file of bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if data.size != int(np.prod(shape)):
        raise DataError(f"{path}: {data.size:,} values, its header says {int(np.prod(shape)):,}")
    return data.reshape(shape)


def from_hub(name: str) -> dict[str, Pictures]:
    """An image data set of the hub, with columns image and label."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("hub data sets need the package datasets: pip install 'deltaw[train]'") from error
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # whatever the hub client raises: one message for all of it
        raise DataError(
            f"source={name} is neither a file here nor reachable as a hub data set ({type(error).__name__}); give a local npz or IDX folder"
        ) from error
    return {
        key: Pictures(
            np.stack([_grey(r["image"]) for r in part]), np.asarray([r["label"] for r in part], dtype=np.int64)
        )
        for key, part in loaded.items()
        if key in ("train", "test")
    }


def read_picture(path: Path, shape: tuple[int, int]) -> Array:
    """One image file as (height, width), float32, 0 .. 1, resized to `shape`.

    Raises:
        DataError: it is missing or no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("image files need pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return _grey(image.resize((shape[1], shape[0])))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: no readable image ({error})") from error


def _grey(image: Any) -> Array:
    return np.asarray(image.convert("L"), dtype=np.float32) / 255.0


def _pictures(images: Array, labels: Array, where: Path, colour: bool = False) -> Pictures:
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if not (images.ndim == 3 or (colour and images.ndim == 4 and images.shape[-1] == 3)) or labels.ndim != 1:
        raise DataError(
            f"{where}: pictures must be (count, height, width) and labels (count,); found {images.shape} and {labels.shape}"
        )
    if labels.dtype.kind != "f" or len(images) != len(labels):
        return Pictures(_pixels(images, where), labels.astype(np.int64))
    known = ~np.isnan(labels)
    return Pictures(_pixels(images[known], where), _whole(labels[known], where), int((~known).sum()))


def _whole(labels: Array, where: Path) -> Array:
    """Labels that were saved as floats, as int64."""
    odd = labels[~np.isfinite(labels) | (labels != np.round(labels))]
    if len(odd):
        raise DataError(
            f"{where}: {len(odd):,} labels are no whole numbers, the first is {odd[0]:g}: number the classes"
        )
    return labels.astype(np.int64)


def _pixels(images: Array, where: Path) -> Array:
    """Pixels as float32, 0 .. 1: integers are parts of 255, floats and booleans are taken as they are.

    Raises:
        DataError: their scale is another, or some are no numbers.
    """
    kind = images.dtype.kind
    if kind not in "biuf":
        raise DataError(f"{where}: pixels of type {images.dtype}; wanted: uint8 in 0 .. 255, or floats in 0 .. 1")
    if kind == "f" and not np.isfinite(images).all():
        bad = int((~np.isfinite(images.reshape(len(images), -1)).all(axis=1)).sum())
        raise DataError(
            f"{where}: {bad:,} of {len(images):,} pictures hold NaN or infinity: mend them or leave them out"
        )
    low, high = (images.min(), images.max()) if images.size else (0, 0)
    if kind in "iu":
        if low < 0 or high > 255:
            raise DataError(
                f"{where}: {images.dtype} pixels range from {low} to {high}; integers must lie in 0 .. 255: "
                "scale them there and save them as uint8, or to 0 .. 1 and save them as floats"
            )
        return images.astype(np.float32) / np.float32(255)
    if low < -ROUNDING or high > 1 + ROUNDING:
        how = "divide them by 255" if low >= 0 and high <= 255 else "scale them with (x - lowest) / (highest - lowest)"
        raise DataError(
            f"{where}: {images.dtype} pixels range from {low:g} to {high:g}; floats must lie in 0 .. 1: {how}"
        )
    return images.astype(np.float32).clip(0, 1)
