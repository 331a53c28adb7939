"""metrics.jsonl: one JSON object per line, always written. A resumed run cuts off what the lost steps had written.

The open file is also the run's lock: two processes never train in one folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, DataError

METRICS = "metrics.jsonl"

try:
    import fcntl
except ImportError:  # Windows has no record locks; there a run is not guarded
    fcntl = None  # type: ignore[assignment]


class Record:
    """Appends to `path`; with None it keeps nothing (processes other than the main one).

    follow: called with every row that is written.

    Raises:
        ConfigError: another process has the file open, so it is training in this very folder.
    """

    def __init__(self, path: Path | None) -> None:
        self.follow: Callable[[dict[str, Any]], None] = lambda row: None
        self.file = None if path is None else path.open("ab")
        if self.file is not None and fcntl is not None:
            try:
                # a record lock: it goes with its process, and forked workers that outlive a kill do not hold it
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.file.close()
                raise ConfigError(
                    f"{path.parent if path else ''}: another process is training in this folder; wait for it, or stop it first"
                ) from None
            except OSError:
                pass  # a file system without locks

    def write(self, row: dict[str, Any]) -> None:
        """Add a line."""
        if self.file is not None:
            self.file.write(json.dumps(jsonable(row)).encode() + b"\n")
            self.file.flush()
            self.follow(row)

    def flush(self) -> int:
        """Make all lines durable; returns the file's size in bytes."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Forget what was written after the file had `size` bytes."""
        if self.file is not None:
            self.file.truncate(size)
            self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk: what could not be written was said before
                self.file.close()


def jsonable(value: Any) -> Any:
    """`value` with None for what JSON has no word for: NaN (the AUC of one class alone) and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(each) for key, each in value.items()}
    return [jsonable(each) for each in value] if isinstance(value, (list, tuple)) else value


def recorded(path: Path, *keys: str) -> list[Any]:
    """What the JSON object in the file `path` of a run says under `keys`.

    Raises:
        DataError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text())
        return [found[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): put back a copy of it, or train into another folder"
        ) from None


def read_record(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]
