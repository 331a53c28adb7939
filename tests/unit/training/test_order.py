"""Sample order and augmentation are pure functions of (seed, epoch) and (seed, epoch, index)."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaw.training.order import WINDOW, batches, generator, in_order, share

SIZES = st.integers(1, 200)


@given(SIZES, st.integers(1, 17), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_every_example_comes_once_and_nothing_else_decides(count, size, seed, epoch, by_length):
    lengths = [(i * 7) % 23 for i in range(count)] if by_length else None
    np.random.seed(count)  # the global generators must not matter
    first = batches(count, size, seed, epoch, lengths)
    np.random.seed(0)
    again = batches(count, size, seed, epoch, lengths)
    assert first == again
    assert sorted(i for b in first for i in b) == list(range(count))
    assert all(len(b) <= size for b in first)
    assert sum(len(b) < size for b in first) <= 1


def test_epochs_and_seeds_differ():
    orders = [batches(64, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(o) for o in orders}) == 4


def test_bucketing_puts_similar_lengths_together():
    lengths = [i % 50 for i in range(WINDOW * 8)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches(len(lengths), 8, 0, 0, lengths)]
    plain = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches(len(lengths), 8, 0, 0)]
    assert sum(spread) < sum(plain) / 3


@given(SIZES, st.integers(1, 17))
def test_evaluation_order_covers_everything_by_length(count, size):
    lengths = [(i * 7) % 23 for i in range(count)]
    flat = [i for b in in_order(count, size, lengths) for i in b]
    assert sorted(flat) == list(range(count))
    assert [lengths[i] for i in flat] == sorted(lengths)


@given(st.lists(st.integers(), min_size=1, max_size=40, unique=True), st.integers(1, 7), st.integers(1, 4))
def test_ranks_share_a_batch_without_loss(batch, size, world):
    shares = [share(batch, size, rank, world) for rank in range(world)]
    assert sorted(i for own in shares for micro in own for i in micro) == sorted(batch)
    assert len({len(own) for own in shares}) == 1, "every process must do the same number of passes"
    assert all(len(micro) <= size for own in shares for micro in own)


def test_a_generator_depends_on_its_key_only():
    assert generator("a", 1).integers(1 << 60) == generator("a", 1).integers(1 << 60)
    assert generator("a", 1).integers(1 << 60) != generator("a", 2).integers(1 << 60)
