"""cat: the exact weighted sum Σ wᵢ ΔWᵢ, the factors side by side.

[B₁ B₂] [A₁; A₂] = B₁A₁ + B₂A₂: no approximation, any weights (negative ones subtract: task arithmetic,
arXiv:2212.04089), any mixture of ranks and scales. The price is the rank, which is the sum of the parts'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltaw.compose.combiner import Combiner, Term, combiner
from deltaw.core.true_change import Matrix
from deltaw.ops.product import Product, total


def weighted_sum(terms: Sequence[Term]) -> Matrix:
    """Σ wᵢ ΔWᵢ: as factors if all terms have them, else dense in float64."""
    products = [t.change.scaled(t.weight) for t in terms if isinstance(t.change, Product)]
    if len(products) == len(terms):
        return total(products)
    return sum((t.weight * t.dense() for t in terms[1:]), start=terms[0].weight * terms[0].dense())


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class Cat(Combiner):
    """Σ wᵢ ΔWᵢ, exactly; the result's rank is the sum of the ranks (or `rank=`, by SVD)."""

    kind: ClassVar[str] = "cat"
    keeps_one: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        return weighted_sum(terms)
