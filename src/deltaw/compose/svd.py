"""svd: the exact weighted sum, then the best approximation of the rank (or energy) that is asked for.

By Eckart and Young no matrix of that rank is nearer to Σ wᵢ ΔWᵢ in Frobenius norm. The SVD is taken of the factors
(ops/product.py): nothing of the size of a weight is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltaw.compose.cat import weighted_sum
from deltaw.compose.combiner import Combiner, Term, combiner
from deltaw.core.true_change import Matrix


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class SVD(Combiner):
    """Σ wᵢ ΔWᵢ, truncated to `rank=` or `energy=`; with neither, to the largest rank among the parts."""

    kind: ClassVar[str] = "svd"
    default_rank: ClassVar[str] = "max"
    keeps_one: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        return weighted_sum(terms)
