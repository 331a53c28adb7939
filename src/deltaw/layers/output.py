"""What layers have in common that add a change to their output: y = frozen(x) + Σ scale · B(A(x)), without a dense ΔW.

The terms come from the active deltas of the weight, of its parts (padded with zero rows) and of a layer tied to it
(transposed where the two layers store the parameter in different orientations).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.host import Host, Spoken
from deltaw.core.part import parameter_of, placed, placed_rows, rows_of
from deltaw.core.roster import Active
from deltaw.core.variant import FrozenMatrix, LowRank
from deltaw.ops.seeded import seeded_dropout

Known = dict[tuple[Host, str], FrozenMatrix]
"""Frozen matrices by host and site."""


class OutputHost(Host):
    """A layer with one weight whose changes can be added to its output."""

    weight: Tensor
    family: ClassVar[str]

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """The weight as it is stored, (out, in)."""
        return {"weight": tuple(layer.weight.shape)}  # type: ignore[arg-type]

    def low_rank(self, active: Active | None = None, known: Known | None = None) -> list[LowRank] | None:
        """The active changes of the weight (or those of `active`) as low-rank terms, or None if one is not of that form.

        known: frozen matrices that are looked up once for several `active`.
        """
        terms: list[LowRank] = []
        for spoken in self.speaking("weight", active):
            parts = self.terms_of(spoken, {} if known is None else known)
            if parts is None:
                return None
            terms.extend(parts if spoken.weight == 1.0 else [weighted(p, spoken.weight) for p in parts])
        return terms

    def terms_of(self, spoken: Spoken, known: Known) -> Sequence[LowRank] | None:
        """The terms of one delta, for this layer's matrix (out, in)."""
        key = spoken.host, spoken.site
        if key not in known:
            known[key] = spoken.host.frozen_matrix(spoken.site)
        terms = spoken.delta.low_rank(known[key])
        rows = rows_of(spoken.site)
        if terms is None:
            return None
        if rows is not None:
            out = spoken.host.to_matrix(parameter_of(spoken.site), spoken.host.stored_parameter(spoken.site)).shape[-2]
            terms = tuple(
                t._replace(B=placed(t.B, rows, out), gain=None if t.gain is None else placed_rows(t.gain, rows, out))
                for t in terms
            )
        if spoken.host is self:
            return terms
        mine = self.to_matrix("weight", self.weight)
        theirs = spoken.host.to_matrix(parameter_of(spoken.site), spoken.host.stored_parameter(spoken.site))
        if mine.shape == theirs.shape and mine.stride() == theirs.stride():
            return terms
        if mine.shape == theirs.mT.shape and mine.stride() == theirs.mT.stride():
            return None if any(t.gain is not None for t in terms) else [t._replace(A=t.B.mT, B=t.A.mT) for t in terms]
        return None


def weighted(term: LowRank, weight: float) -> LowRank:
    """The term, times `weight`."""
    return term._replace(scale=weight * term.scale, gain=None if term.gain is None else weight * term.gain)


def added(
    y: Tensor,
    bias: Tensor | None,
    terms: Sequence[LowRank],
    low: Callable[[LowRank], Tensor],
    *,
    training: bool,
) -> Tensor:
    """y + Σ (gain ⊙ (y - bias) + low(term)): the frozen output y, (..., out), with its changes, in y's dtype.

    low: B(A(drop(x))) of one term, its scale in B already, shaped as y.
    A term of rank 0 is a gain alone. With gain = 0 and B = 0 the result is y to the bit.
    """
    total = y
    for t in terms:
        if t.A.shape[0]:
            change = low(t._replace(scale=1.0, B=t.scale * t.B))  # B has the fewer numbers
            if training and t.dropout and t.dropout_at == "output":
                change = seeded_dropout(change, t.dropout)
            total = plus(total, change)
        if t.gain is not None:
            total = plus(total, t.gain * (y if bias is None else y - bias.to(y.dtype)))
    return total


def plus(y: Tensor, change: Tensor) -> Tensor:
    """y + change, summed in the wider of the two precisions and rounded once to y's."""
    return (y.to(torch.promote_types(y.dtype, change.dtype)) + change).to(y.dtype)


def dropped_input(x: Tensor, term: LowRank, training: bool) -> Tensor:
    """What A sees of x."""
    return seeded_dropout(x, term.dropout) if training and term.dropout and term.dropout_at == "input" else x
