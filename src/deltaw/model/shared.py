"""Which arguments all rows share, although their size is by chance that of the batch: found out by trying.

A bias (T, T) over T positions, or a number for each of C channels, cannot be told from rows by its shape where the batch
has T or C of them. So the base runs on the whole batch, and then on its first and on its last rows: with the right
arguments cut to these rows, and the others whole, it gives the same rows. No dropout, no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

from deltaw.model import trees
from deltaw.model.probe import mark, same

MOST = 3
"""Of the arguments in doubt, so many at most are shared: a decoder's three masks (T, T)."""
UNFIT = (RuntimeError, ValueError, IndexError, AssertionError)
"""What a model says to arguments that do not fit one another."""

Run = Callable[[Mapping[str, int], Sequence[int]], Any]
"""The base on these rows of the arguments {dotted name: dimension of the rows}, all others whole."""


def shared(run: Run, where: Mapping[str, int], doubtful: Sequence[str], count: int) -> tuple[str, ...] | None:
    """The fewest of the `doubtful` arguments that must be left whole; None if no choice gives the batch's own rows.

    None of them, where the base gives nothing but numbers for the whole batch.
    """
    whole = {name: leaf for name, leaf in trees.leaves(run({}, ())) if isinstance(leaf, Tensor) and leaf.ndim}
    few = min(2, count // 2)
    for size in range(min(MOST, len(where) - 1, len(doubtful)) + 1 if whole else 0):
        for chosen in combinations(doubtful, size):
            cut = {name: dim for name, dim in where.items() if name not in chosen}
            if all(holds(run, cut, rows, whole, count) for rows in (range(few), range(count - few, count))):
                return chosen
    return None if whole else ()


def holds(run: Run, cut: Mapping[str, int], rows: Sequence[int], whole: Mapping[str, Tensor], count: int) -> bool:
    """Whether the base, on some rows of the arguments `cut`, gives these rows of what it gave on all.

    An output of the same shape for some rows as for all says nothing about them; one at least must follow the rows.
    """
    try:
        part = dict(trees.leaves(run(cut, rows)))
    except UNFIT:
        return False
    following = [name for name, leaf in whole.items() if getattr(part.get(name), "shape", None) != leaf.shape]
    return bool(following) and all(are_rows(whole[name], part.get(name), rows, count) for name in following)


def are_rows(whole: Tensor, part: Any, rows: Sequence[int], count: int) -> bool:
    """Whether `part` is these rows of `whole`, in the one dimension in which they differ."""
    if not isinstance(part, Tensor) or part.ndim != whole.ndim:
        return False
    moved = [d for d in range(whole.ndim) if whole.shape[d] != part.shape[d]]
    if len(moved) != 1 or whole.shape[moved[0]] * len(rows) != part.shape[moved[0]] * count:
        return False
    expected = trees.take(whole, trees.unfold(rows, whole.shape[moved[0]] // count), moved[0])
    one, two = mark(expected.movedim(moved[0], 0)), mark(part.movedim(moved[0], 0))
    return same(one.prints, two.prints, one.close)
