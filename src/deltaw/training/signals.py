"""Being asked to stop: the first SIGINT or SIGTERM is remembered and obeyed between two steps, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A run stopped because it was told to. `code` is what the process ends with: 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Stop:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    def asked(self) -> bool:
        """True once a signal has come."""
        return self.number is not None

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch SIGINT and SIGTERM while inside (main thread only; elsewhere nothing is caught)."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self.number is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
                os._exit(128 + number)  # files are written aside and renamed, so nothing is left half-done
            self.number = number  # torchrun passes on what a terminal has sent already, and kills after its own grace

        try:
            before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            yield self
            return
        try:
            yield self
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)
