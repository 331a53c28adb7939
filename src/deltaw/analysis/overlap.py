"""How the change lies to the base: does it use W's own top directions, or bring new ones (intruder dimensions)?

Overlap: φ (see similarity.py) between ΔW's directions and W's, with the random baseline.

Intruder dimensions (Shuttleworth et al. 2024, arXiv:2410.21228): a top singular direction of the tuned weight W + ΔW
that no singular direction of W resembles, max over all i of |cos(uⱼ(W + ΔW), uᵢ(W))| < threshold. The paper finds them
in LoRA-tuned models, not in fully tuned ones, and with them more forgetting. This needs a full SVD of W: seconds for a
hidden size of a few thousand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaw.analysis.directions import directions, matrices
from deltaw.analysis.similarity import Similarities, subspace_similarity
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base
from deltaw.core.options import one_of, positive_int
from deltaw.errors import ConfigError
from deltaw.ops.product import Product
from deltaw.ops.truncated_svd import EXACT_UP_TO, top_singular


def overlap(adapter: Adapter, base: Base, *, side: str = "in", top: int = 64) -> Similarities:
    """φ(i, j) between the first i directions of ΔW and the first j of W, j up to `top`, per weight.

    side: "in" (right singular directions) or "out" (left ones).
    """
    one_of("side", side, ("in", "out"))
    positive_int("top", top)
    found, skipped = directions(adapter, base)
    weights = {}
    for key, d in found.items():
        if not d.S.numel():
            skipped[key] = "is not changed at all"
            continue
        U, _, Vh = top_singular(d.of.base(base), top)
        weights[key] = subspace_similarity(d.side(side), Vh.T if side == "in" else U)
    return Similarities(weights, side, skipped)


@dataclass(frozen=True, kw_only=True)
class Intruders:
    """One weight. cosines: for each of the tuned weight's top directions, the largest |cos| with any direction of W."""

    cosines: tuple[float, ...]
    threshold: float

    @property
    def count(self) -> int:
        """How many of them resemble no direction of W."""
        return sum(c < self.threshold for c in self.cosines)


@dataclass(frozen=True)
class IntruderTable(Mapping[str, Intruders]):
    """Parameter name -> `Intruders`. skipped: parameter name -> why it has none."""

    weights: Mapping[str, Intruders]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Intruders:
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def table(self) -> list[dict[str, Any]]:
        """One row per weight, for tables and JSON."""
        return [
            {"weight": key, "intruders": w.count, "of": len(w.cosines), "cosines": list(w.cosines)}
            for key, w in self.weights.items()
        ]


def intruders(
    adapter: Adapter,
    base: Base,
    *,
    top: int = 10,
    threshold: float = 0.5,
    side: str = "out",
    largest: int | None = None,
) -> IntruderTable:
    """Which of the tuned weights' `top` singular directions are new.

    side: "out" (left singular directions, as the paper) or "in".
    threshold: the largest |cos| that still counts as new.
    largest: leave out weights whose smaller side is over this (a full SVD of 4096 x 4096 takes a quarter of a minute).
    """
    one_of("side", side, ("in", "out"))
    positive_int("top", top)
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold!r}: a cosine in (0, 1], for example 0.5")
    skipped: dict[str, str] = {}
    weights: dict[str, Intruders] = {}
    for matter, change in matrices(adapter, base, skipped):
        if largest is not None and min(change.shape) > largest:
            skipped[matter.name] = (
                f"{tuple(change.shape)}: a full SVD of it was not asked for (--intruders asks for it)"
            )
            continue
        dense = change.dense() if isinstance(change, Product) else change
        W = matter.base(base)
        if min(W.shape) > EXACT_UP_TO:
            W, dense = W.float(), dense.float()  # a full SVD: float64 would take minutes
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        top_U, _, top_Vh = top_singular(W + dense, top)
        before, after = (U, top_U) if side == "out" else (Vh.T, top_Vh.T)
        cosines = (before.T @ after).abs().amax(dim=0).clamp(max=1.0)
        weights[matter.name] = Intruders(cosines=tuple(cosines.tolist()), threshold=threshold)
    return IntruderTable(weights, skipped)
