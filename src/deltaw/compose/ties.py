"""TIES: trim, elect a sign, average what agrees (Yadav et al. 2023, arXiv:2306.01708).

On the dense ΔW of each weight, as the paper defines it on task vectors (PEFT applies it to the factors, where a sign
means nothing: flipping the signs of a row of A and a column of B changes no ΔW but changes its result):
1. trim: keep of every ΔWᵢ the `density` largest entries (within this weight; the paper's k % over the whole model
   would need all of them in memory at once);
2. elect: per entry, the sign of Σ wᵢ·trimmedᵢ;
3. merge: per entry, the mean of wᵢ·trimmedᵢ over those i that are not zero and have the elected sign.

With equal weights λ this is λ times the paper's merged task vector. The mean means that two adapters of weight 1 give
about half their sum: read `.error` (against the sum) with that in mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaw.compose.combiner import Combiner, Term, check_density, combiner, keep_largest
from deltaw.core.true_change import Matrix


def elect_and_average(weighted: Sequence[Tensor]) -> Tensor:
    """Steps 2 and 3 for trimmed, weighted changes of one shape."""
    elected = torch.stack(list(weighted)).sum(0).sign()
    total = torch.zeros_like(elected)
    count = torch.zeros_like(elected)
    for w in weighted:
        agrees = (w.sign() == elected) & (w != 0)
        total += torch.where(agrees, w, 0.0)
        count += agrees
    return total / count.clamp(min=1)


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class Ties(Combiner):
    """Trim to `density`, elect signs, average what agrees. 0.2 is the paper's density."""

    kind: ClassVar[str] = "ties"

    density: float = 0.2

    def __post_init__(self) -> None:
        check_density(self.density)

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        return elect_and_average([t.weight * keep_largest(t.dense(), self.density) for t in terms])
