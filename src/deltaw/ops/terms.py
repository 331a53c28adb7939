"""What the adapted linear is told of one adapter, and how it travels through an autograd function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deltaw.ops.cpu_thin import Sweep, takes
from deltaw.ops.dropout import Mask, draw_seed, rows_per_block
from deltaw.ops.matmul import readable
from deltaw.ops.select import is_narrow


class Factors(Protocol):
    """The change ΔW = diag(gain) W + scale · B A of one adapter, as `deltaw.core.variant.LowRank`."""

    @property
    def A(self) -> Tensor:
        """(rank, in)."""

    @property
    def B(self) -> Tensor:
        """(out, rank)."""

    @property
    def scale(self) -> float:
        """The factor in front of B A."""

    @property
    def gain(self) -> Tensor | None:
        """(out,), or None for zero."""

    @property
    def dropout(self) -> float:
        """Probability of zeroing, in training."""

    @property
    def dropout_at(self) -> str:
        """ "input" (of A) or "output" (of the low-rank change)."""


class FrozenProduct(Protocol):
    """A frozen weight W (out, in) kept in some other form, that knows its two products.

    It may have a method `by_rows(x, gradient)` too, which is what the function of that name gives.
    """

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ: (..., in) -> (..., out). A fresh tensor."""

    def matmul_grad(self, g: Tensor) -> Tensor:
        """g W: (..., out) -> (..., in). A fresh tensor."""


def by_rows(frozen: FrozenProduct, x: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """x Wᵀ, or as `gradient` x W, as a fresh (T, n), and the numbers (T, 1) that its rows have still to be multiplied with, if
    any: whoever passes over it anyway does that on the way."""
    own = getattr(frozen, "by_rows", None)
    if own is not None:
        return own(x, gradient)  # type: ignore[no-any-return]
    return flat(frozen.matmul_grad(x) if gradient else frozen.matmul(x)), None


class Term(NamedTuple):
    """One adapter as it acts in one call.

    p: the dropout that is in force (0 in eval); `seed` is there where p > 0.
    merged: whether s B A is part of W' in this call (see select.py).
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    seed: Tensor | None
    scale: float
    p: float
    at_output: bool
    merged: bool

    def input_mask(self, x: Tensor) -> Mask | None:
        """The dropout mask on the adapter's input (T, in), or None where A sees all of it. x: any (T, ...) of its dtype."""
        if self.seed is None or self.at_output:
            return None
        return Mask(self.seed, x.shape[0], self.A.shape[1], self.p, x.dtype)

    def output_mask(self, y: Tensor) -> Mask | None:
        """The dropout mask on the low-rank change (T, out), or None. y: any (T, ...) of its dtype."""
        if self.seed is None or not self.at_output:
            return None
        return Mask(self.seed, y.shape[0], self.B.shape[0], self.p, y.dtype)


TENSORS = 4
"""A, B, gain and seed: the tensors of a term."""

Plan = tuple[tuple[float, float, bool, bool], ...]
"""The constants of each term: scale, p, at_output, merged."""


def in_force(adapter: Factors, training: bool, merge: bool, device: torch.device) -> Term:
    """The adapter as it acts in this call: in training with a fresh seed for its dropout, which cannot be merged."""
    p = adapter.dropout if training else 0.0
    seed = draw_seed(device) if p else None
    at_output = adapter.dropout_at == "output"
    return Term(adapter.A, adapter.B, adapter.gain, seed, adapter.scale, p, at_output, merge and not p)


def pack(terms: Sequence[Term]) -> tuple[Plan, list[Tensor | None]]:
    """The terms as an autograd function takes them: a tuple of constants and a flat list of tensors."""
    return tuple(tuple(t[TENSORS:]) for t in terms), [tensor for t in terms for tensor in t[:TENSORS]]  # type: ignore[misc]


def unpack(plan: Plan, tensors: Sequence[Any]) -> list[Term]:
    """The inverse of `pack`."""
    return [Term._make([*tensors[TENSORS * i : TENSORS * (i + 1)], *constants]) for i, constants in enumerate(plan)]


def total_gain(terms: Sequence[Term]) -> Tensor | None:
    """Σ gain, (out,), or None if no adapter has one."""
    gains = [t.gain for t in terms if t.gain is not None]
    return sum(gains[1:], gains[0]) if gains else None


def moved(terms: Sequence[Term | Factors]) -> bool:
    """Whether some adapter is known to have left its start, where B and gain are zero."""
    return readable() and any(bool(z.any()) for t in terms for z in (t.B, t.gain) if z is not None)


def merged_weight(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """W' = (1 + Σ gain) W + Σ s B A over the merged terms, (out, in). With B = 0 and gain = 0 it is W to the bit."""
    gain, added = total_gain(terms), [t for t in terms if t.merged]
    if gain is not None and len(added) == 1:  # two passes over W, or one
        t = added[0]
        if takes(weight, factors=(gain, t.A, t.B)) and is_narrow(t.A.shape[0], shared=True):
            sweep, merged = Sweep(), torch.empty_like(weight)
            sweep.expand_(merged, t.B, t.A, t.scale, rowscale=1 + gain, source=weight)
            sweep.run()
            return merged
    merged = weight if gain is None else weight * (1 + gain).unsqueeze(1)
    for t in added:
        A, B = t.A.to(weight.dtype), t.B.to(weight.dtype)
        if merged is weight:
            merged = added_product(weight, B, A, t.scale)
        else:
            merged.addmm_(B, A, alpha=t.scale)
    return merged


def added_product(weight: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """W + s B A, (out, in), in W's own memory order, so that the product with it is computed as the one with W."""
    if not weight.is_contiguous() and weight.mT.is_contiguous():  # GPT-2's Conv1D stores Wᵀ
        return torch.addmm(weight.mT, A.mT, B.mT, alpha=scale).mT
    return torch.addmm(weight, B, A, alpha=scale)


def blocks(x: Tensor) -> list[slice]:
    """The blocks of rows of x (T, k), at least one, that a mask is made in, few enough to stay in a CPU's cache through
    several passes; all rows at once elsewhere and under a compiler."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    step = rows_per_block(x.shape[1])
    return [slice(start, start + step) for start in range(0, max(1, x.shape[0]), step)]


def flat(x: Tensor) -> Tensor:
    """(..., k) -> (T, k), a view where x's strides allow; empty batches too."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
