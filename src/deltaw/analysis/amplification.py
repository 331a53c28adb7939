"""What does ΔW do that W does not? The amplification factor of Hu et al. 2021 (arXiv:2106.09685, table 7).

With U, V the top r left and right singular directions of ΔW, ‖UᵀWV‖_F is how much W itself does between these
directions, and
    amplification = ‖ΔW‖_F / ‖UᵀWV‖_F
how much more ΔW does there. For scale: the same projection onto W's own top r directions (the most it could be), and
onto random ones (root mean square over all choices: ‖W‖_F · r / √(out·in)). The paper finds for GPT-3 that ΔW does not
repeat W's top directions, and amplifies ones that W has but does not emphasise: the projection lies a little above
random, far below the top, and the factor is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.analysis.by_weight import ByWeight
from deltaw.analysis.decomposition import Decomposition
from deltaw.analysis.directions import Directions, directions, without_unchanged
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base
from deltaw.core.options import positive_int


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """One weight's row of table 7. rank: r, the number of directions."""

    rank: int
    change: float
    """‖ΔW‖_F of the first r directions."""
    weight: float
    """‖W‖_F."""
    along_change: float
    """‖UᵀWV‖_F for ΔW's directions."""
    along_weight: float
    """The same for W's own top r: the square root of the sum of its r largest σ²."""
    along_random: float
    """The same for random directions, root mean square."""

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖UᵀWV‖_F."""
        return self.change / self.along_change if self.along_change else math.inf

    @property
    def emphasis(self) -> float:
        """Where W's projection lies between random (0) and its own top directions (1), on a logarithmic scale."""
        if not 0 < self.along_random < self.along_weight or not self.along_change:
            return math.nan
        return math.log(self.along_change / self.along_random) / math.log(self.along_weight / self.along_random)


class Amplifications(ByWeight[Amplification]):
    """Parameter name -> `Amplification`."""

    def table(self) -> list[dict[str, Any]]:
        """One row per weight, for tables and JSON."""
        return [
            {
                "weight": key,
                "rank": a.rank,
                "change_norm": a.change,
                "weight_norm": a.weight,
                "along_change": a.along_change,
                "along_weight": a.along_weight,
                "along_random": a.along_random,
                "factor": a.factor if math.isfinite(a.factor) else None,
            }
            for key, a in self.weights.items()
        ]

    def __str__(self) -> str:
        rows = {
            key: f"{a.rank:2d}  {a.change:7.3g}  {a.weight:7.3g}  {a.along_change:16.3g}"
            f"  {a.along_weight:6.3g}  {a.along_random:6.3g}  {a.factor:7.2f}"
            for key, a in self.weights.items()
        }
        return self.lines(" r     ‖ΔW‖      ‖W‖   ‖UᵀWV‖ along ΔW       W  random   factor", rows)


def amplification(adapter: Adapter, base: Base, *, rank: int | None = None) -> Amplifications:
    """The amplification factor of every changed matrix, and what to compare it with.

    base: the model that the adapter was trained on (plain, or with adapters), or its parameters by name.
    rank: r; None takes all directions that ΔW has. The factor does not depend on how ΔW is split into A and B.

    Raises:
        UnknownName, AdapterError: the base has no such weight, or of another shape.
    """
    if rank is not None:
        positive_int("rank", rank)
    found, skipped = directions(adapter, base)
    changed, skipped = without_unchanged(found, skipped)
    return Amplifications(
        {key: amplified(d, Decomposition(d.of.base(base)), rank) for key, d in changed.items()}, skipped
    )


def amplified(d: Directions, base: Decomposition, rank: int | None = None) -> Amplification:
    """One weight's row. `d` has at least one direction."""
    r = d.S.numel() if rank is None else min(rank, d.S.numel())
    W = base.W
    norm = float(W.norm())
    return Amplification(
        rank=r,
        change=float(d.S[:r].norm()),
        weight=norm,
        along_change=float(torch.linalg.matrix_norm(d.U[:, :r].T @ W @ d.Vh[:r].T)),
        along_weight=float(base.top(r)[1].norm()),
        along_random=norm * r / math.sqrt(W.shape[0] * W.shape[1]),
    )
