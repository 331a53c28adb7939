"""Where results go: a new folder unless told otherwise, and never over something that is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from deltaw.errors import ConfigError

MARKS = ("run.json", "compare.json", "metrics.jsonl", "pretrained/run.json", "dataset.json", "analysis.json")
"""A folder that holds one of these was written by a command of ours."""


def new_folder(out: str | None, default: str, overwrite: bool) -> Path:
    """The folder to write to. `default` gets a number if it is taken; a folder that was named must be free.

    Raises:
        ConfigError: `out` exists and `overwrite` is not given, or what is there was not written by a command of ours.
    """
    if out is None:
        path = Path("runs") / default
        number = 2
        while path.exists():
            path = Path("runs") / f"{default}-{number}"
            number += 1
        return path
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise ConfigError(
                f"--out {out} exists: choose another folder, or give --overwrite to replace it (or `deltaw resume {out}` to go on with it)"
            )
        if not path.is_dir():
            raise ConfigError(f"--out {out} is a file: choose a folder")
        if path.resolve() in (Path.cwd(), *Path.cwd().parents, Path.home()):
            raise ConfigError(f"--out {out} holds the working folder: it is not replaced")
        if not any((path / mark).is_file() for mark in MARKS):
            raise ConfigError(
                f"--out {out} holds none of {', '.join(MARKS)}, so no command of ours has written it: "
                "it is not replaced; choose another folder, or remove it yourself"
            )
        shutil.rmtree(path)
    return path
