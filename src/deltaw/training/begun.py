"""Where a run was begun: its configuration names files as they were called from there.

run.json (of a comparison: compare.json) keeps the directory and the folder's name as it was given. Whoever opens the run
from somewhere else finds what it names as long as both are still there; after a move names are taken as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KEY = "begun"
PATHS = ("model", "path", "source", "tokenizer")
"""Keys of a configuration whose value may be a file or folder."""


def begun(folder: Path) -> dict[str, dict[str, str]]:
    """What a run in `folder` keeps of where it is begun: here, under this name."""
    return {KEY: {"directory": os.getcwd(), "folder": str(folder)}}


def directory_of(folder: Path, file: str) -> Path | None:
    """Where the run in `folder`, which `file` describes, was begun; None if that is not known or `folder` has moved."""
    try:
        kept = json.loads((folder / file).read_text())[KEY]
        directory = Path(kept["directory"])
        return directory if (directory / kept["folder"]).samefile(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def as_begun(folder: Path, file: str) -> Iterator[Path]:
    """Within the context the process works where the run was begun; gives the folder's name there."""
    directory = directory_of(folder, file)
    if directory is None:
        yield folder
        return
    with contextlib.chdir(directory):
        yield Path(json.loads((directory / folder / file).read_text())[KEY]["folder"])


def placed(nested: Mapping[str, Any], directory: Path | None) -> dict[str, Any]:
    """A nested configuration in which names of files in `directory` are absolute."""

    def absolute(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: absolute(k, v) for k, v in value.items()}
        is_there = directory is not None and key in PATHS and isinstance(value, str) and (directory / value).exists()
        return str(directory / value) if is_there else value

    return {k: absolute(k, v) for k, v in nested.items()}
