"""Which adapters a model carries and which of them speak now, for all hosts of one model and for each thread.

`threading.local` rather than a ContextVar: `torch.compile(fullgraph=True)` can trace it.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from deltaw.errors import ModelError
from deltaw.ops.compact import hooks_in_force

Active = tuple[tuple[str, float], ...]
"""Names and weights of the adapters whose changes are added up."""


class ByRow(ABC):
    """Different adapters for different rows of one batch: decides how a host is called (see model/rows.py)."""

    @abstractmethod
    def call(self, host: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `forward(*args, **kwargs)` of `host` gives, each row with its own adapters."""


Speaking = Active | ByRow
"""Who speaks in a call: the same adapters for the whole batch, or some for each row."""


class Frame(NamedTuple):
    """A context in which a thread is: who speaks in it, autograd's next number and the saved-tensor hooks where it began.

    again: it was entered by a recomputation in backward.
    """

    speaking: Speaking
    number: int
    hooks: Any
    again: bool = False


class Roster:
    """Shared by all hosts of one model.

    names: of its adapters, in the order in which they came. notes: of each, what its file said of base and extra facts.
    default: active in every thread that is not inside `use` or `disabled`.
    local: per thread, `override` (who is active inside of `use`), `rows` (who is, row by row), `frames` (the contexts around
    it, the outermost first), `again` (a recomputation says so).
    touched: its hosts, and the layers of which it froze something (see model/one_roster.py); not known of a copy.
    merged: None, or what `unmerge` needs.
    journals: thread -> the contexts of its calls without a graph (see recall.py). probes: what `rows` found out.
    uncalled: ids of the hosts that no call has reached since they were adapted, until the model's first call ends.
    """

    def __init__(self) -> None:
        self.default: Active = ()
        self.names: list[str] = []
        self.touched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.merged: Any = None
        self.notes: dict[str, dict[str, Any]] = {}
        self.local = threading.local()
        self.journals: dict[int, tuple[list[int], list[tuple[Frame, ...]]]] = {}
        self.probes: dict[Any, Any] = {}
        self.uncalled: set[int] = set()

    def active(self) -> Active:
        """The active adapters of the calling thread; none while changes are merged into the weights."""
        if self.merged is not None:
            return ()
        override: Active | None = getattr(self.local, "override", None)
        return self.default if override is None else override

    def speaking(self) -> Speaking:
        """Who speaks in the calling thread."""
        rows: ByRow | None = getattr(self.local, "rows", None)
        return self.active() if rows is None else rows

    def frames(self) -> tuple[Frame, ...]:
        """The contexts in which the calling thread is, the outermost first; the first one is that of no `use`."""
        inner: tuple[Frame, ...] = getattr(self.local, "frames", ())
        return (Frame(() if self.merged is not None else self.default, 0, None), *inner)

    @contextmanager
    def using(self, speaking: Speaking, recalled: bool = False) -> Iterator[None]:
        """Let `speaking` speak in this thread; restores what was before, also after an exception.

        recalled: as what a recomputation began with, not as a context of its own.

        Raises:
            ModelError: this context is left before one that was entered after it.
        """
        local = self.local
        before = getattr(local, "override", None), getattr(local, "rows", None), getattr(local, "again", False)
        frames: tuple[Frame, ...] = getattr(local, "frames", ())
        mine = frames
        if isinstance(speaking, ByRow):
            local.rows = speaking
        else:
            local.override, local.rows = speaking, None
        if not torch.compiler.is_compiling():
            again = local.again = torch._C._current_graph_task_id() != -1  # said again by a recomputation in backward
            number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            frame = Frame(speaking, 0, None, again) if recalled else Frame(speaking, number, hooks_in_force(), again)
            mine = local.frames = (*frames, frame)
        try:
            yield
        finally:
            if torch.compiler.is_compiling() or getattr(local, "frames", ()) is mine:
                local.override, local.rows, local.again = before
                local.frames = frames
            else:
                self.leave(mine[-1])

    def leave(self, frame: Frame) -> None:
        """Take a context out of this thread from wherever it stands: those that are left speak as if it had never been.

        Raises:
            ModelError: it is not the innermost one.
        """
        local = self.local
        frames = getattr(local, "frames", ())
        local.frames = tuple(f for f in frames if f is not frame)
        local.override, local.rows, local.again = None, None, False
        for left in local.frames:
            if isinstance(left.speaking, ByRow):
                local.rows = left.speaking
            else:
                local.override, local.rows = left.speaking, None
            local.again = left.again
        if not frames or frames[-1] is not frame:
            raise ModelError(
                "a dw.use, dw.disabled or dw.rows was left before one that this thread entered after it, which spoke in its "
                "place: contexts of one thread must nest. Tasks of asyncio share a thread, and so do a generator and its "
                "caller: do not await or yield inside, run the call in a thread (asyncio.to_thread), or give one dw.rows"
            )

    def __getstate__(self) -> dict[str, Any]:
        mine = ("touched", "local", "journals", "probes", "uncalled")
        return {k: v for k, v in self.__dict__.items() if k not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.touched = weakref.WeakSet()
        self.local = threading.local()
        self.journals = {}
        self.probes = {}
        self.uncalled = set()
