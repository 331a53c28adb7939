"""Rows of a table from a file, a folder of files, or the hub, as they are written there."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from deltaw.errors import DataError, MissingExtra, did_you_mean
from deltaw.training.config import DataConfig
from deltaw.training.copies import COPIES, how_to_get, installed

Row = Mapping[str, Any]
Part = TypeVar("Part")
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
SPLITS = ("test", "validation", "train")
HALF = re.compile("[\ud800-\udfff]")
"""A surrogate without its other half, which JSON can write and UTF-8 cannot."""
READABLE = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_source(data: DataConfig) -> tuple[dict[str, list[Row]], str]:
    """Split name -> rows of `data.path`, and a phrase that says where they came from.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    if data.path is None:
        raise DataError(
            "no data: set data=FILE (jsonl, csv, tsv, json, parquet), a folder with train/validation/test files, or a hub id"
        )
    path = Path(data.path).expanduser()
    if path.is_dir():
        files = by_split(p for p in path.iterdir() if p.suffix.lower() in READABLE and p.is_file())
        found = {split: list(read_file(file)) for split, file in files.items()}
        if "train" not in found:
            raise DataError(
                f"{path}: no train file (train.jsonl, train.csv, train.parquet ...) among {sorted(p.name for p in path.iterdir())[:10]}"
            )
        return found, str(path)
    if path.is_file():
        return {"train": list(read_file(path))}, str(path)
    copy = installed(data.path)
    if copy is not None:
        only = COPIES[data.path].only
        rows = [r for r in read_file(copy) if all(r.get(c) == v for c, v in only)]
        return {"train": rows}, f"{data.path}, from the installed package {COPIES[data.path].package}"
    if path.suffix.lower() in READABLE or path.is_absolute() or data.path.startswith(".") or data.path.count("/") > 1:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"data={data.path}: no such file{near}")
    return from_hub(data), data.path


def by_split(paths: Iterable[Path]) -> dict[str, Path]:
    """Split name -> the file or folder that is named for it; others are left out.

    Raises:
        DataError: two of them mean the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        split = SPLIT_NAMES.get((path.name if path.is_dir() else path.stem).lower())
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{path.parent}: {found[split].name} and {path.name} both mean the {split} split: "
                "keep one of them, or join them"
            )
        found[split] = path
    return found


def part_of(source: Mapping[str, Part], where: str, split: str) -> Part:
    """The part of `source` that is called `split`.

    Raises:
        DataError: there is none.
    """
    if split not in source:
        raise DataError(f"{where} has no split {split!r}: it has {', '.join(source)}{did_you_mean(split, source)}")
    return source[split]


def to_score(source: Mapping[str, Part], where: str, split: str | None) -> tuple[str, list[Part]]:
    """What of other data is scored, behind its name: `split` if one is asked for, else "test", else "all" that is there.

    Raises:
        DataError: there is no such split.
    """
    if split is None and "test" not in source:
        return "all", list(source.values())
    return split or "test", [part_of(source, where, split or "test")]


def from_hub(data: DataConfig) -> dict[str, list[Row]]:
    """Rows of a data set of the hub (or of what `datasets` finds under that name)."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("hub data sets need the package datasets: pip install 'deltaw[train]'") from error
    assert data.path is not None
    try:
        loaded = datasets.load_dataset(data.path, revision=data.revision)
    except Exception as error:  # whatever the hub client raises: one message for all of it
        raise DataError(
            f"data={data.path} is neither a file here nor reachable as a hub data set ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}); {how_to_get(data.path)}{did_you_mean(data.path, [p.name for p in Path().iterdir()])}"
        ) from error
    found: dict[str, list[Row]] = {}
    for name, part in loaded.items():
        names = getattr(part.features.get(data.label), "names", None)
        for column, kind in part.features.items():
            if isinstance(kind, datasets.Image):  # as its bytes: decoded when an example is needed
                part = part.cast_column(column, datasets.Image(decode=False))
        rows: list[Row] = [dict(r) for r in part]
        if names:
            rows = [{**r, data.label: _class_name(names, r[data.label])} for r in rows]
        found[SPLIT_NAMES.get(name, name)] = rows
    return found


def _class_name(names: Sequence[str], label: int | None) -> str | None:
    """The name of a class; None for the -1 with which hidden test labels are marked."""
    return names[label] if label is not None and label >= 0 else None


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, by its ending.

    Raises:
        DataError: the file cannot be read, a column comes twice, or a row is no mapping of column names, has more
            values than columns, or holds a text that is none.
    """
    for number, row in enumerate(_rows(path), 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: {str(row)[:60]!r} is no object with named columns")
        if half := next((text for text in _texts(row) if not text.isascii() and HALF.search(text)), None):
            raise DataError(
                f"{path}, row {number}: {half[:60]!r} holds half of a character (a lone surrogate): mend it"
            )
        yield row


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, inside lists and objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _rows(path: Path) -> Iterator[Any]:
    kind = path.suffix.lower()
    if kind not in READABLE:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without ending'}; readable: {', '.join(READABLE)}"
        )
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, list):
                found = f"an object of {', '.join(map(repr, content))[:60]}" if isinstance(content, dict) else content
                raise DataError(f"{path}: holds {str(found)[:80]}; wanted: a list of objects with named columns")
            yield from content
        elif kind == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            yield json.loads(line)
                        except json.JSONDecodeError as error:
                            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
        else:
            yield from _table(path, "\t" if kind == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]} ({error}): save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]} ({error})") from error


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("parquet files need pyarrow: pip install 'deltaw[train]'") from error
    try:
        _distinct(path, pyarrow.parquet.read_schema(path).names)
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read as parquet ({why}): write it again") from error
    return rows


def _table(path: Path, separator: str) -> Iterator[Row]:
    """The rows of a csv or tsv file whose first row names the columns. A short row lacks its last values: None."""
    records = filter(None, _records(path, separator))
    columns = next(records, [])
    _distinct(path, columns)
    for number, values in enumerate(records, 1):
        if len(values) > len(columns):
            raise DataError(
                f"{path}, row {number}: {len(values)} values for {len(columns)} columns; "
                "a value that holds the separator must stand in double quotes"
            )
        yield dict(zip_longest(columns, values))


def _records(path: Path, separator: str) -> Iterator[list[str]]:
    """The values of every row; a value in quotes may hold line breaks, and so a row may be several lines."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        first = 1
        try:
            for values in reader:
                yield values
                first = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}: the row that begins in line {first} cannot be read as {path.suffix[1:].lower()} ({error}): "
                "close the quote there; inside a quoted value, a quote is written twice"
            ) from error


def _distinct(path: Path, columns: Iterable[str]) -> None:
    """Refuse a name that two columns have; columns without a name (a spreadsheet's trailing commas) do not matter."""
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise DataError(f"{path}: {' and '.join(map(repr, twice))} names more than one column: rename or remove one")
