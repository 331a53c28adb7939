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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaw.analysis.directions import directions
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base
from deltaw.core.options import positive_int
from deltaw.ops.truncated_svd import top_singular


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


@dataclass(frozen=True)
class Amplifications(Mapping[str, Amplification]):
    """Parameter name -> `Amplification`. skipped: parameter name -> why it has none."""

    weights: Mapping[str, Amplification]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Amplification:
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

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
        wide = max([len(key) for key in self.weights] + [6])
        lines = [f"{'weight':{wide}}   r     ‖ΔW‖      ‖W‖   ‖UᵀWV‖ along ΔW       W  random   factor"]
        for key, a in self.weights.items():
            lines.append(
                f"{key:{wide}}  {a.rank:2d}  {a.change:7.3g}  {a.weight:7.3g}  {a.along_change:16.3g}"
                f"  {a.along_weight:6.3g}  {a.along_random:6.3g}  {a.factor:7.2f}"
            )
        return "\n".join([*lines, *(f"left out: {k} ({why})" for k, why in self.skipped.items())])


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
    weights: dict[str, Amplification] = {}
    for key, d in found.items():
        r = d.S.numel() if rank is None else min(rank, d.S.numel())
        if not r:
            skipped[key] = "is not changed at all"
            continue
        W = d.of.base(base)
        norm = float(W.norm())
        top = top_singular(W, r)[1]
        weights[key] = Amplification(
            rank=r,
            change=float(d.S[:r].norm()),
            weight=norm,
            along_change=float(torch.linalg.matrix_norm(d.U[:, :r].T @ W @ d.Vh[:r].T)),
            along_weight=float(top.norm()),
            along_random=norm * r / math.sqrt(W.shape[0] * W.shape[1]),
        )
    return Amplifications(weights, skipped)
