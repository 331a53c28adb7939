"""How the change lies to the base: does it use W's own top directions, or bring new ones (intruder dimensions)?

Overlap: φ (see similarity.py) between ΔW's directions and W's, with the random baseline.

Intruder dimensions (Shuttleworth et al. 2024, arXiv:2410.21228): a top singular direction of the tuned weight W + ΔW
that no singular direction of W resembles, max over all i of |cos(uⱼ(W + ΔW), uᵢ(W))| < threshold. The paper finds them
in LoRA-tuned models, not in fully tuned ones, and with them more forgetting. This needs a full SVD of W: seconds for a
hidden size of a few thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaw.analysis.by_weight import ByWeight
from deltaw.analysis.decomposition import Decomposition
from deltaw.analysis.directions import Directions, Found, directions, without_unchanged
from deltaw.analysis.similarity import Similarities, Similarity, subspace_similarity
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base
from deltaw.core.options import one_of, positive_int
from deltaw.errors import ConfigError
from deltaw.ops.truncated_svd import top_singular


def overlap(adapter: Adapter, base: Base, *, side: str = "in", top: int = 64) -> Similarities:
    """φ(i, j) between the first i directions of ΔW and the first j of W, j up to `top`, per weight.

    side: "in" (right singular directions) or "out" (left ones).
    """
    one_of("side", side, ("in", "out"))
    positive_int("top", top)
    found, skipped = directions(adapter, base)
    changed, skipped = without_unchanged(found, skipped)
    weights = {key: overlapping(d, Decomposition(d.of.base(base)), side, top) for key, d in changed.items()}
    return Similarities(weights, skipped, side)


def overlapping(d: Directions, base: Decomposition, side: str, top: int) -> Similarity:
    """One weight's φ(i, j) between ΔW's directions and W's."""
    U, _, Vh = base.top(top)
    return subspace_similarity(d.side(side), Vh.T if side == "in" else U)


@dataclass(frozen=True, kw_only=True)
class Intruders:
    """One weight. cosines: for each of the tuned weight's top directions, the largest |cos| with any direction of W."""

    cosines: tuple[float, ...]
    threshold: float

    @property
    def count(self) -> int:
        """How many of them resemble no direction of W."""
        return sum(c < self.threshold for c in self.cosines)


class IntruderTable(ByWeight[Intruders]):
    """Parameter name -> `Intruders`."""

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
    found, skipped = directions(adapter, base)
    searched, skipped = without_large(found, skipped, largest)
    weights = {
        key: intruding(d, Decomposition(d.of.base(base)), top=top, threshold=threshold, side=side)
        for key, d in searched.items()
    }
    return IntruderTable(weights, skipped)


def without_large(found: dict[str, Directions], skipped: dict[str, str], largest: int | None) -> Found:
    """The matrices whose smaller side is at most `largest`, and `skipped` with the others."""
    large = {name: d.shape for name, d in found.items() if largest is not None and min(d.shape) > largest}
    why = {
        name: f"{shape}: a full SVD of it was not asked for (--intruders asks for it)" for name, shape in large.items()
    }
    return {name: d for name, d in found.items() if name not in large}, {**skipped, **why}


def intruding(d: Directions, base: Decomposition, *, top: int, threshold: float, side: str) -> Intruders:
    """One weight's intruder dimensions."""
    U, _, Vh = base.whole()
    tuned = base.W + d.U * d.S @ d.Vh
    top_U, _, top_Vh = top_singular(tuned.to(U.dtype), top)
    before, after = (U, top_U) if side == "out" else (Vh.T, top_Vh.T)
    cosines = (before.T @ after).abs().amax(dim=0).clamp(max=1.0)
    return Intruders(cosines=tuple(cosines.tolist()), threshold=threshold)
