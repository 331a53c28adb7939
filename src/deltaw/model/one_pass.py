"""One pass over a mixed batch: the model runs once, and every adapted layer splits its own call by adapter.

Rows that no adapter of theirs changes in a layer go through it in one group. Sizes are checked in every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NoReturn

from torch import Tensor, nn

from deltaw.core.host import Host
from deltaw.core.roster import Active, ByRow
from deltaw.errors import ModelError
from deltaw.model import state, trees
from deltaw.model.probe import opaque

Group = tuple[Active, list[int]]
"""Adapters, and the rows that have them."""


def changed_by(host: Host, names: Iterable[str]) -> frozenset[str]:
    """Those of the adapters `names` that change what a call of `host` computes: its own, those of a tied layer, those of
    hosts inside."""
    inside = [h.adapters for h in state.layers_of(host).values() if isinstance(h, Host)]
    return frozenset(n for n in names if any(n in adapters._modules or n in adapters.tied for adapters in inside))


def sorted_groups(groups: Sequence[Group]) -> tuple[list[Group], list[int]]:
    """The groups of a batch whose rows are sorted by group, and the order of the rows that sorts them; groups of equal
    length lie together (`ops.grouped.runs`)."""
    groups = sorted(groups, key=lambda group: len(group[1]))
    order = [row for _, rows in groups for row in rows]
    spans = accumulate((len(rows) for _, rows in groups), initial=0)
    return [(active, list(range(at, at + len(rows)))) for (active, rows), at in zip(groups, spans)], order


class Unproven(ModelError):
    """In one pass, a layer was called otherwise than in the probe: the caller splits, unless that layer runs again in backward."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"dw.rows: {path} {reason}, in a part that runs again in backward (gradient checkpointing), where the batch can "
            "no longer be split: use how='split'"
        )
        self.path = path
        self.reason = reason


class OnePass(ByRow):
    """Speaks during one pass: splits the call of every host by the adapters that change it.

    groups: adapters and the rows that have them. multiples: id of a host -> entries per row, where not 1.
    follows: id of a host -> which of its tensor arguments follow the rows (from the probe); None: the caller vouches.
    """

    def __init__(
        self,
        root: nn.Module,
        groups: Sequence[Group],
        multiples: Mapping[int, int],
        follows: Mapping[int, tuple[bool, ...]] | None,
    ) -> None:
        self.root = root
        self.groups = groups
        self.count = sum(len(group) for _, group in groups)
        self.multiples = multiples
        self.follows = follows
        self.names = frozenset(name for active, _ in groups for name, _ in active)
        self.known: dict[tuple[frozenset[str], int], list[Group]] = {}

    def groups_at(self, host: Host) -> list[Group]:
        """The entries of this very host's call by the adapters that change it."""
        names, multiple = changed_by(host, self.names), self.multiples.get(id(host), 1)
        if (names, multiple) not in self.known:
            found: dict[Active, list[int]] = {}
            for active, rows in self.groups:
                here = tuple((name, weight) for name, weight in active if name in names)
                found[here] = sorted([*found.get(here, ()), *rows])
            self.known[names, multiple] = [(active, trees.unfold(rows, multiple)) for active, rows in found.items()]
        return self.known[names, multiple]

    def call(self, host: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        groups = self.groups_at(host)
        if len(groups) == 1:
            with host.roster.using(groups[0][0]):
                return forward(host, *args, **kwargs)
        follows = self.checked(host, args, kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            whole = self.at_once(host, args[0], groups)
            if whole is not None:
                return whole
        outputs = []
        for active, some in groups:
            some_args, some_kwargs = trees.taken((args, kwargs), dict.fromkeys(follows, 0), some)
            with host.roster.using(active):
                outputs.append(forward(host, *some_args, **some_kwargs))
        return trees.together(outputs, functools.partial(self.join, host, [some for _, some in groups]))

    def at_once(self, host: Host, x: Tensor, groups: Sequence[Group]) -> Tensor | None:
        """One operation for all groups, on the rows sorted by group, if the layer has one."""
        spans: list[tuple[Active, int, int]] = []
        start = 0
        for active, some in groups:
            spans.append((active, start, start + len(some)))
            start += len(some)
        order = [entry for _, some in groups for entry in some]
        y = host.grouped_call(trees.take(x, order), spans)
        return None if y is None else trees.place([y], [order])

    def checked(self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
        """The names of the arguments that follow the rows."""
        given = list(trees.leaves((args, kwargs)))
        tensors = [(n, t) for n, t in given if isinstance(t, Tensor)]
        strange = next((t for _, t in given if opaque(t)), None)
        if strange is not None:  # a cache: what one group writes (Mamba's mixer does), the next one would read
            reason = f"is given a {type(strange).__name__}, whose rows cannot be taken apart"
            self.refuse(host, reason, "leave it out (use_cache=False)")
        entries = self.count * self.multiples.get(id(host), 1)
        seen = None if self.follows is None else self.follows.get(id(host))
        if self.follows is not None and (seen is None or len(seen) != len(tensors)):
            raise Unproven(self.path(host), "was called otherwise than in the probe")
        names = set()
        for i, (name, tensor) in enumerate(tensors):
            fits = tensor.ndim > 0 and tensor.shape[0] == entries
            if fits and (seen is None or seen[i]):
                names.add(name)
            elif seen is not None and seen[i]:
                raise Unproven(self.path(host), f"was called with {tuple(tensor.shape)} for {self.count} rows")
        if not names:
            self.refuse(host, f"no tensor of its call has {entries} entries in its first dimension")
        return names

    def join(self, host: Host, entries: Sequence[Sequence[int]], name: str, pieces: Sequence[Any]) -> Any:
        """One output of a host from those of the groups."""
        if not isinstance(pieces[0], Tensor):
            if any(p is not pieces[0] and p != pieces[0] for p in pieces):
                self.refuse(host, f"gives {name!r}, which is no tensor and differs between the rows")
            return pieces[0]
        if any(p.ndim == 0 or p.shape[0] != len(some) for p, some in zip(pieces, entries)):
            self.refuse(
                host, f"gives shapes {[tuple(p.shape) for p in pieces]} for {[len(e) for e in entries]} entries"
            )
        return trees.place(pieces, entries)

    def refuse(self, host: Host, reason: str, cure: str = "declare its multiple, or use 'auto' or 'split'") -> NoReturn:
        """Give up one pass: the caller splits, or, where one pass was demanded, learns why it cannot be."""
        if self.follows is None:
            raise ModelError(f"dw.rows(how='one pass'): {self.path(host)} {reason}: {cure}")
        raise Unproven(self.path(host), reason)

    def path(self, host: Host) -> str:
        """The host's path."""
        return next((p for p, h in state.hosts(self.root) if h is host), "a layer")
