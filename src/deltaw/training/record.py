"""metrics.jsonl: one JSON object per line, always written. A resumed run cuts off what the lost steps had written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Record:
    """Appends to `path`; with None it keeps nothing (processes other than the main one)."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("ab")

    def write(self, row: dict[str, Any]) -> None:
        """Add a line."""
        if self.file is not None:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()

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
            self.file.close()


def read_record(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]
