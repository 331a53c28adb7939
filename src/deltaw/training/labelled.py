"""Texts and labels out of rows: checked, counted, split.

Nothing is dropped without being counted, and no text is in two splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deltaw.errors import DataError, did_you_mean
from deltaw.training.config import DataConfig
from deltaw.training.order import generator
from deltaw.training.rows import SPLITS, Row, part_of, read_source, to_score

SHOWN = 60
"""Characters of a class name that are shown."""
DROPPED = "dropped: "
"""How the note about rows that are not used begins."""


@dataclass(frozen=True)
class LabelledText:
    """The examples of a text classification: split -> [(text, class index)], class names, and what was dropped and why."""

    splits: dict[str, list[tuple[str, int]]]
    labels: list[str]
    dropped: dict[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """One line per split with class counts, and one for what was dropped."""
        lines = []
        for name, rows in self.splits.items():
            counts = Counter(label for _, label in rows)
            lines.append(
                f"{name}: {len(rows):,} examples ({', '.join(f'{short(self.labels[i])} {counts[i]:,}' for i in range(len(self.labels)))})"
            )
        if self.dropped:
            lines.append(_told(self.dropped))
        return lines


def short(name: str) -> str:
    """A class name as a line for people shows it."""
    return name if len(name) <= SHOWN else f"{name[:SHOWN]}..."


def _told(dropped: Mapping[str, int]) -> str:
    """ "dropped: 3 duplicate, 1 without label"."""
    return DROPPED + ", ".join(f"{n:,} {why}" for why, n in dropped.items())


def labelled_text(
    data: DataConfig, seed: int, label_names: Mapping[str, str] | None = None
) -> tuple[LabelledText, str]:
    """Read, clean and split `data`. Also returns where it came from.

    Rows without text or label, duplicates, and texts that carry two different labels are dropped and counted. Missing
    splits are cut from the training rows with `seed`, whatever order the source has. `label_names` renames classes.

    Raises:
        DataError: a column is missing, nothing is left, there is one class only, or a split lacks a class of another.
    """
    source, where = read_source(data)
    return labelled(source, where, data, seed, label_names), where


def labelled(
    source: Mapping[str, Sequence[Row]],
    where: str,
    data: DataConfig,
    seed: int,
    label_names: Mapping[str, str] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> LabelledText:
    """Clean and split the rows of `source` as `labelled_text` does. dropped: what the reader has dropped already."""
    if data.split is not None:
        source = {"train": part_of(source, where, data.split)}
    source = {
        name: source[name] for name in SPLITS if name in source
    }  # a test text is never trained on: test goes first
    if "train" not in source:
        raise DataError(f"{where}: no train split; choose one with data.split=")
    gone = Counter(dropped or {})
    claimed: set[str] = set()
    clean: dict[str, list[tuple[str, str]]] = {}
    for name, part in source.items():
        _check_columns(part, data, f"{where} ({name})")
        usable = _clean(part, data, claimed, gone)
        if usable or name == "train":
            clean[name] = usable
    total = sum(map(len, clean.values()))
    rows = sorted(clean.pop("train"))
    generator("split", seed).shuffle(rows)  # type: ignore[arg-type]
    for name, share in (("test", data.test), ("validation", data.validation)):
        if name not in clean and share > 0:
            clean[name], rows = _cut(rows, share)
    if data.limit is not None and _lopsided(rows[: data.limit], rows):
        generator("limit", seed).shuffle(rows)  # type: ignore[arg-type]
    clean["train"] = rows[: data.limit]
    labels = sorted({label for part in clean.values() for _, label in part}, key=_natural)
    why = f" ({_told(gone)})" if gone else ""
    _check_spelling(labels, where)
    if len(labels) < 2:
        raise DataError(
            f"{where}: {'no usable row' if not labels else f'only one class, {labels[0]!r}'}{why}; "
            "a classifier needs at least two classes"
        )
    if not clean["validation"] or len(labels) > max(10, total / 2):
        numbers = " (numbers to be predicted are not supported)" if all(_natural(x)[0] == 0 for x in labels) else ""
        raise DataError(
            f"{where}: {total} usable rows of {len(labels)} classes are too few: classification needs several rows "
            f"of each class{numbers}{why}"
        )
    missing = set(labels) - {label for _, label in clean["train"]}
    if missing & {label for _, label in rows}:
        raise DataError(
            f"{where}: data.limit={data.limit} leaves no training example of class "
            f"{', '.join(map(repr, sorted(missing)))}: raise it"
        )
    if missing:
        raise DataError(
            f"{where}: no training example of class {', '.join(map(repr, sorted(missing)))}, which other splits have: "
            f"mend the label there, or add examples of it to train{why}"
        )
    index = {label: i for i, label in enumerate(labels)}
    names = [str((label_names or {}).get(label, label)) for label in labels]
    splits = {name: [(t, index[label]) for t, label in clean[name]] for name in reversed(SPLITS) if clean.get(name)}
    return LabelledText(splits, names, dict(gone))


def _cut(rows: Sequence[tuple[str, str]], share: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(held out, rest): `share` of every class, at least one row of each that has two, in the order of `rows`."""
    counts = Counter(label for _, label in rows)
    wanted = {label: min(max(1, round(share * count)), count - 1) for label, count in counts.items()}
    held, rest = [], []
    for row in rows:
        if wanted[row[1]] > 0:
            wanted[row[1]] -= 1
            held.append(row)
        else:
            rest.append(row)
    return held, rest


def _lopsided(front: Sequence[tuple[str, str]], rows: Sequence[tuple[str, str]]) -> bool:
    """Whether a class has less than half of its share in `front`: of few rows, `_cut` may take all of a class at the front."""
    here, all_of_it = Counter(label for _, label in front), Counter(label for _, label in rows)
    return any(here[label] * len(rows) < 0.5 * count * len(front) for label, count in all_of_it.items())


def all_rows(
    data: DataConfig, labels: Sequence[str], label_names: Mapping[str, str] | None = None
) -> tuple[str, list[tuple[str, int]], list[str]]:
    """(name, rows, notes) of what `to_score` takes of `data`, for a model that knows the classes `labels`.

    Raises:
        DataError: a split or column is missing, nothing is usable, or a class is unknown.
    """
    source, where = read_source(data)
    name, rows, dropped = labelled_whole(source, where, data, labels, label_names)
    return name, rows, [f"data: {where}, {len(rows):,} examples", *dropped]


def labelled_whole(
    source: Mapping[str, Sequence[Row]],
    where: str,
    data: DataConfig,
    labels: Sequence[str],
    label_names: Mapping[str, str] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> tuple[str, list[tuple[str, int]], list[str]]:
    """The name and the usable rows of `source` as `all_rows` gives them, and a line if others are not.

    Equal ones stay, as often as they come. dropped: what the reader has dropped already.
    """
    split, parts = to_score(source, where, data.split)
    rows = [row for part in parts for row in part]
    _check_columns(rows, data, where)
    gone = Counter(dropped or {})
    index = {name: i for i, name in enumerate(labels)}
    found = []
    for text, label in _usable(rows, data, gone):
        name = str((label_names or {}).get(label, label))
        if name not in index:
            raise DataError(
                f"{where}: class {label!r} is none of {', '.join(map(repr, labels))}{did_you_mean(label, labels)}"
            )
        found.append((text, index[name]))
    if not found:
        raise DataError(f"{where}: no usable row ({_told(gone)})")
    return split, found, [_told(gone)] if gone else []


def _check_columns(rows: Sequence[Row], data: DataConfig, where: str) -> None:
    if not rows:
        raise DataError(f"{where}: there are no rows")
    columns = list(rows[0])
    if len(columns) == 1 and (mark := next((sign for sign in ";\t|" if sign in columns[0]), None)):
        raise DataError(
            f"{where}: its columns {columns[0]!r} are separated by {mark!r}: save it with commas, or with tabs as .tsv"
        )
    for key, column in (("text", data.text), ("label", data.label)):
        if column not in columns:
            near = next((c for c in columns if c.strip().lower() == column.lower()), None)
            hint = did_you_mean(column, columns) if near is None else f"; did you mean {near!r}?"
            raise DataError(
                f"{where}: no column {column!r} among {', '.join(map(repr, columns))}{hint}{' S' if hint else ': s'}et "
                f"data.{key}={_as_setting(near)}"
            )
    for number, row in enumerate(rows, 1):
        if isinstance(label := row.get(data.label), (list, dict)):
            raise DataError(
                f"{where}, row {number}: the label is a {type(label).__name__}: multi-label data are not supported, "
                "give every row one class"
            )


def _as_setting(column: str | None) -> str:
    """A column's name as it is typed in a shell; a name with outer spaces needs quotes of YAML within those of the shell."""
    return "COLUMN" if column is None else column if column.isidentifier() else f"'\"{column}\"'"


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in numeric order, then words."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _check_spelling(labels: Iterable[str], where: str) -> None:
    """Refuse two labels that are one number to Python: 1 and 1.0, or True and 1."""
    spelt: dict[float, str] = {}
    for label in labels:
        _, number, _ = _natural(label)
        if label in ("True", "False"):
            number = float(label == "True")
        elif label != f"{number:.0f}" and label != str(number):  # 01 and 1 may be two codes
            continue
        if number in spelt:
            raise DataError(f"{where}: the labels {spelt[number]!r} and {label!r} are one number: write it in one way")
        spelt[number] = label


def _usable(rows: Iterable[Row], data: DataConfig, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """The text and the label of every row that has both."""
    for row in rows:
        text, label = row.get(data.text), row.get(data.label)
        if text is not None and text == text and not isinstance(text, str):
            dropped[f"whose text is of the kind {type(text).__name__}"] += 1
            continue
        text = text.strip() if isinstance(text, str) else ""
        label = "" if label is None or label != label else str(label).strip()  # NaN, the missing number, is not itself
        if not text:
            dropped["without text"] += 1
        elif not label:
            dropped["without label"] += 1
        else:
            yield text, label


def _clean(rows: Iterable[Row], data: DataConfig, claimed: set[str], dropped: Counter[str]) -> list[tuple[str, str]]:
    """Every text once, with its one label."""
    first: dict[str, str] = {}
    conflicting: set[str] = set()
    for text, label in _usable(rows, data, dropped):
        if text in claimed:
            dropped["also in another split"] += 1
        elif text not in first:
            first[text] = label
        else:
            dropped["duplicate"] += 1
            if first[text] != label:
                conflicting.add(text)
    for text in conflicting:
        dropped["with contradicting labels"] += 1
        del first[text]
    claimed.update(first)
    return list(first.items())
