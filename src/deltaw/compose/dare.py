"""DARE: drop entries of ΔW at random and rescale the rest (Yu et al. 2023, arXiv:2311.03099).

Each ΔWᵢ keeps every entry with probability `density` (the paper's 1 - p) and is divided by it, so that its expectation
is unchanged; then the changes are added up (`then="sum"`), or go through TIES's sign election (`then="ties"`).
The masks are a function of (seed, weight's name, adapter's place): the same whatever else is combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaw.compose.combiner import Combiner, Term, check_density, combiner, draw_mask
from deltaw.compose.ties import elect_and_average
from deltaw.core.options import one_of
from deltaw.core.true_change import Matrix


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class Dare(Combiner):
    """Random dropping to `density`, rescaled by 1/density, then the weighted "sum", or "ties" without a second trim."""

    kind: ClassVar[str] = "dare"

    density: float = 0.5
    then: str = "sum"

    def __post_init__(self) -> None:
        check_density(self.density)
        one_of("then", self.then, ("sum", "ties"))

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        dropped = [t.weight * self.drop(key, t, seed) for t in terms]
        return elect_and_average(dropped) if self.then == "ties" else torch.stack(dropped).sum(0)

    def drop(self, key: str, term: Term, seed: int) -> Tensor:
        """The term's ΔW with its entries dropped and rescaled."""
        dense = term.dense()
        mask = draw_mask(dense.shape, self.density, seed=seed, key=key, place=term.place).to(dense.device)
        return torch.where(mask, dense / self.density, 0.0)
