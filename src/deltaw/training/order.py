"""The order of the examples: a pure function of (seed, epoch), so that a restart needs to know nothing but a number.

No iterator is ever stored: a run that stopped after k batches of epoch e takes `batches(...)[k:]` of epoch e.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

WINDOW = 16
"""Batches whose examples are sorted by length together. Larger: less padding, less mixing."""


def generator(*key: int | str) -> np.random.Generator:
    """A private random generator that depends on nothing but `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint64))


def batches(count: int, size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """The batches of one epoch: each index of `range(count)` once, `size` to a batch, the last one maybe shorter.

    With `lengths`, examples of similar length share a batch: a shuffle, a sort within windows of `WINDOW` batches, and
    a shuffle of the batches.
    """
    random = generator("order", seed, epoch)
    order = random.permutation(count)
    if lengths is None:
        return [order[i : i + size].tolist() for i in range(0, count, size)]
    by_index = np.asarray(lengths)
    found: list[list[int]] = []
    for start in range(0, count, size * WINDOW):
        window = order[start : start + size * WINDOW]
        window = window[np.argsort(by_index[window], kind="stable")]
        found += [window[i : i + size].tolist() for i in range(0, len(window), size)]
    return [found[i] for i in random.permutation(len(found))]


def in_order(count: int, size: int, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """Batches for evaluation: by length where known, else as they come."""
    order = np.arange(count) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")
    return [order[i : i + size].tolist() for i in range(0, count, size)]


def share(batch: Sequence[int], size: int, rank: int, world: int) -> list[list[int]]:
    """Rank `rank`'s micro-batches of a global batch, at most `size` examples each.

    The examples go round the ranks in turn; every rank gets the same number of micro-batches (empty ones at the end of
    a short batch), as processes that wait for each other must.
    """
    own = list(batch[rank::world])
    rounds = -(-len(batch) // (world * size))
    return [own[i * size : (i + 1) * size] for i in range(rounds)]
