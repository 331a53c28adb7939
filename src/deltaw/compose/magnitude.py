"""magnitude: prune each ΔW to its largest entries, then add up: TIES's first step alone, without the sign election.

Pruning by magnitude is the baseline that TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) compare themselves with.
The pruned matrix is not of low rank; `combine` takes the best approximation of the rank that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltaw.compose.combiner import Combiner, Term, check_density, combiner, keep_largest
from deltaw.core.true_change import Matrix


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class Magnitude(Combiner):
    """Σ wᵢ · (ΔWᵢ with only the `density` largest share of its entries)."""

    kind: ClassVar[str] = "magnitude"

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        return torch.stack([t.weight * keep_largest(t.dense(), self.density) for t in terms]).sum(0)
