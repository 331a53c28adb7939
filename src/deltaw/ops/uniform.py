"""`Tensor.uniform_` to the bit, several times faster: random starts are a good part of what attaching costs (uniform.c)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deltaw.ops.compiled import addressable, library
from deltaw.ops.matmul import readable

WORTH = 2048
"""Numbers from which on the call of compiled code pays (benchmarks/uniform.py)."""
STATE = 8 * (3 + 624)
"""Bytes of a generator's state that are read."""


def uniform_(t: Tensor, low: float, high: float) -> Tensor:
    """Fill t, of any shape, as `t.uniform_(low, high)` does: the same numbers, and the generator is left as by that.

    Compiled for fp32 without gaps on a CPU, else torch's own. Between the reading of the generator and its return another
    thread's draws from it would be drawn once more, a few microseconds.
    """
    if t.numel() < WORTH or not (readable() and addressable(t) and t.is_contiguous() and agrees()):
        return t.uniform_(low, high)
    filled(t, low, high, torch.default_generator)
    torch.autograd.graph.increment_version(t)
    return t


def filled(t: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """t with numbers of this generator, by the compiled function."""
    compiled = library()
    assert not isinstance(compiled, str), compiled
    state = generator.get_state()
    compiled.uniform(state.data_ptr(), t.data_ptr(), t.numel(), low, high)
    generator.set_state(state)
    return t


@functools.cache
def agrees() -> bool:
    """Whether the compiled function is there, and draws what this torch does, from where its generator keeps it."""
    if isinstance(library(), str):
        return False
    mine, torchs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    if mine.get_state().numel() < STATE:
        return False
    low, high = -0.1, 0.23  # a span that is no power of two: numbers that are rounded once more on the way differ
    for count in (1000, 7, 1000):
        torchs_own = torch.empty(count).uniform_(low, high, generator=torchs)
        if not torch.equal(filled(torch.empty(count), low, high, mine), torchs_own):
            return False
    return torch.equal(mine.get_state(), torchs.get_state())
