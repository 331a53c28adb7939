"""Which adapters a model carries and which of them speak now, for all hosts of one model and for each thread.

`threading.local` rather than a ContextVar: `torch.compile(fullgraph=True)` can trace it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Active = tuple[tuple[str, float], ...]
"""Names and weights of the adapters whose changes are added up."""


class Roster:
    """Shared by all hosts of one model.

    default: active in every thread that is not inside `use` or `disabled`.
    frozen: parameter name -> whether it required a gradient before the first attach; `detach` restores it.
    merged: None, or what `unmerge` needs.
    """

    def __init__(self) -> None:
        self.default: Active = ()
        self.names: list[str] = []
        self.frozen: dict[str, bool] = {}
        self.merged: Any = None
        self.notes: dict[str, dict[str, Any]] = {}
        self.local = threading.local()

    def active(self) -> Active:
        """The active adapters of the calling thread; none while changes are merged into the weights."""
        if self.merged is not None:
            return ()
        override: Active | None = getattr(self.local, "override", None)
        return self.default if override is None else override

    @contextmanager
    def using(self, active: Active) -> Iterator[None]:
        """Make `active` the active set of this thread; restores the previous one, also after an exception."""
        before = getattr(self.local, "override", None)
        self.local.override = active
        try:
            yield
        finally:
            self.local.override = before

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local = threading.local()
