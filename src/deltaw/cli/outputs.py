"""Where results go: JSON on stdout, or a new folder unless told otherwise, and never over something that is there.

`--overwrite` puts what is there aside, and takes it away when the new result is there; if nothing came of the command, it
is put back.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from deltaw.errors import ConfigError

Kind = Literal["run", "comparison", "data set", "report"]
MARKS: dict[Kind, tuple[str, ...]] = {
    "run": ("run.json", "metrics.jsonl", "pretrained/run.json"),
    "comparison": ("compare.json",),
    "data set": ("dataset.json",),
    "report": ("analysis.json",),
}
"""A folder that holds one of these is what a command of ours has written."""
RESULTS = ("checkpoints", "adapter_model.safetensors", "model.safetensors", "dataset.json", "analysis.json")
"""What a command that came to something leaves, somewhere in its folder."""


def strict(facts: Any, indent: int | None = None) -> str:
    """`facts` as JSON; null in the place of numbers that JSON cannot write (NaN, infinity)."""
    from deltaw.training.record import jsonable

    return json.dumps(jsonable(facts), indent=indent, allow_nan=False)


@contextmanager
def new_folder(out: str | None, default: str, overwrite: bool, kind: Kind) -> Iterator[Path]:
    """The folder to write to. `default` gets a number if it is taken; a folder that was named must be free.

    kind: what is written; with `overwrite` only such a thing is replaced.

    Raises:
        ConfigError: `out` exists and `overwrite` is not given, is something else, or a process is training in it.
    """
    path = named(out, default)
    aside = None
    if out is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        check_replaced(path, out, overwrite, kind)
        aside = path.with_name(f".{path.name}.replaced-{secrets.token_hex(4)}")
        os.rename(path, aside)
    try:
        yield path
    except BaseException:
        if aside is not None and not any(next(path.rglob(name), None) for name in RESULTS):
            shutil.rmtree(path, ignore_errors=True)
            os.rename(aside, path)
            aside = None
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def named(out: str | None, default: str) -> Path:
    """`out`, or the first of runs/DEFAULT, runs/DEFAULT-2 ... that is free.

    Raises:
        ConfigError: `out` is empty.
    """
    if out is not None:
        if not out.strip():
            raise ConfigError("--out is empty: name a folder, or leave the option out")
        return Path(out)
    path, number = Path("runs") / default, 2
    while path.exists():
        path = Path("runs") / f"{default}-{number}"
        number += 1
    return path


def check_replaced(path: Path, out: str, overwrite: bool, kind: Kind) -> None:
    """Refuse to replace what is at `path`.

    Raises:
        ConfigError: as `new_folder`.
    """
    from deltaw.training.record import METRICS, Record

    if not path.is_dir():
        raise ConfigError(f"--out {out} is a file: choose another name for the folder")
    if not overwrite:
        begun = any((path / mark).is_file() for mark in ("run.json", "compare.json"))
        again = (
            f" (or `deltaw resume {out}` to go on with it)" if begun and not (path / "results.json").is_file() else ""
        )
        raise ConfigError(f"--out {out} exists: choose another folder, or give --overwrite to replace it{again}")
    if path.resolve() in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise ConfigError(f"--out {out} holds the working folder: it is not replaced")
    holds = [each for each, marks in MARKS.items() if any((path / mark).is_file() for mark in marks)]
    if not holds:
        every = ", ".join(mark for marks in MARKS.values() for mark in marks)
        raise ConfigError(
            f"--out {out} holds none of {every}, so no command of ours has written it: "
            "it is not replaced; choose another folder, or remove it yourself"
        )
    if "comparison" in holds:  # which has its runs inside, and their metrics together
        holds = ["comparison"]
    if holds != [kind]:
        raise ConfigError(
            f"--out {out} holds a {holds[0]}, which is not replaced: choose another folder for the {kind}"
        )
    for metrics in path.rglob(METRICS):
        Record(metrics).close()  # refused while another process is training there
