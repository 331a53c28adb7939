"""Do two adapters use the same directions? Subspace similarity of Hu et al. 2021 (arXiv:2106.09685, section 7.2).

    φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖²_F / min(i, j)  in [0, 1]
with U₁ᵢ the first i singular directions of the one change and U₂ⱼ the first j of the other: 1 if the smaller span lies
in the larger, 0 if they are orthogonal. Two spans drawn at random in d dimensions have E φ = max(i, j) / d, which is
not small for small layers: every result carries this baseline.

The paper takes the directions from the factor A alone, which depends on how training split ΔW between A and B
(A → MA, B → BM⁻¹ changes them). Here they are those of ΔW by default; `of="factors"` gives the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.analysis.by_weight import ByWeight
from deltaw.analysis.directions import Directions, Found, Matter, directions, without_noise
from deltaw.core.adapter import Adapter, check_adapter
from deltaw.core.base_weights import Base
from deltaw.core.options import one_of, positive_int
from deltaw.core.true_change import as_product
from deltaw.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class Similarity:
    """φ of one weight: `phi[i-1, j-1]` = φ(i, j), float64. dimension: d of the space that the directions live in."""

    phi: Tensor
    dimension: int

    @property
    def baseline(self) -> Tensor:
        """E φ(i, j) = max(i, j) / d of random spans, of `phi`'s shape."""
        i = torch.arange(1, self.phi.shape[0] + 1, dtype=torch.float64)
        j = torch.arange(1, self.phi.shape[1] + 1, dtype=torch.float64)
        return torch.maximum(i[:, None], j[None, :]) / self.dimension

    def at(self, i: int, j: int) -> float:
        """φ(i, j), counted from 1."""
        return float(self.phi[i - 1, j - 1])

    @property
    def whole(self) -> float:
        """φ of all directions of both."""
        return float(self.phi[-1, -1])

    @property
    def above_random(self) -> float:
        """(φ - baseline) / (1 - baseline) for all directions: 0 for random spans, 1 for one inside the other."""
        expected = float(self.baseline[-1, -1])
        return (self.whole - expected) / (1 - expected) if expected < 1 else 0.0


@dataclass(frozen=True)
class Similarities(ByWeight[Similarity]):
    """Parameter name -> `Similarity`. side: which directions, "in" or "out"."""

    side: str = "in"

    def mean(self) -> tuple[Tensor, Tensor]:
        """φ and its random baseline at every (i, j), averaged over the weights that have so many directions."""
        if not self.weights:
            raise ConfigError("no weight is changed by both adapters in directions that could be compared")
        i = max(s.phi.shape[0] for s in self.weights.values())
        j = max(s.phi.shape[1] for s in self.weights.values())
        phi, baseline, count = (torch.zeros(i, j, dtype=torch.float64) for _ in range(3))
        for s in self.weights.values():
            here = (slice(s.phi.shape[0]), slice(s.phi.shape[1]))
            phi[here] += s.phi
            baseline[here] += s.baseline
            count[here] += 1
        return phi / count, baseline / count

    def table(self) -> list[dict[str, Any]]:
        """One row per weight, for tables and JSON."""
        return [
            {
                "weight": key,
                "dimension": s.dimension,
                "whole": s.whole,
                "first": s.at(1, 1),
                "baseline": float(s.baseline[-1, -1]),
                "phi": s.phi.tolist(),
            }
            for key, s in self.weights.items()
        ]

    def __str__(self) -> str:
        rows = {}
        for key, s in self.weights.items():
            expected = s.baseline
            rows[key] = (
                f"{s.whole:6.3f}  {float(expected[-1, -1]):6.3f}  {s.at(1, 1):6.3f}  {float(expected[0, 0]):6.3f}"
            )
        return self.lines(f"φ(all)  random  φ(1,1)  random   ({self.side} directions)", rows)


def subspace_similarity(first: Tensor, second: Tensor) -> Similarity:
    """φ(i, j) for orthonormal columns `first` (d, I) and `second` (d, J), leading directions first."""
    squares = (first.double().T @ second.double()).square()  # (I, J)
    sums = squares.cumsum(0).cumsum(1)
    i = torch.arange(1, squares.shape[0] + 1, dtype=torch.float64, device=sums.device)
    j = torch.arange(1, squares.shape[1] + 1, dtype=torch.float64, device=sums.device)
    return Similarity((sums / torch.minimum(i[:, None], j[None, :])).cpu(), first.shape[0])


def similarity(
    a: Adapter,
    b: Adapter,
    *,
    side: str = "in",
    of: str = "change",
    top: int | None = None,
    base: Base | None = None,
) -> Similarities:
    """φ(i, j) between the directions of `a` and `b` for every weight that both change.

    side: "in" (right singular directions: what ΔW reads) or "out" (left ones: what it writes).
    of: "change" (directions of ΔW) or "factors" (of A for "in", of B for "out": the paper's figure 3).
    top: compare only this many leading directions.
    base: needed for changes that depend on the base weight.

    Raises:
        ConfigError: no weight is changed by both, or `top` is no whole number of at least 1.
        AdapterError: a weight has different shapes in the two.
    """
    one_of("side", side, ("in", "out"))
    one_of("of", of, ("change", "factors"))
    if top is not None:
        positive_int("top", top)
    common = _in_common(a, b)
    pick = _of_factors if of == "factors" else directions
    found = [pick(x.replace(changes={k: x.changes[k] for k in common}), base) for x in (a, b)]
    return compare((a, b), (found[0], found[1]), side=side, top=top)


def compare(
    adapters: tuple[Adapter, Adapter], found: tuple[Found, Found], *, side: str, top: int | None = None
) -> Similarities:
    """`similarity` of two adapters whose directions are known already."""
    common = set(_in_common(*adapters))
    skipped = dict.fromkeys({k for a in adapters for k in a.changes} - common, "changed by one of the two only")
    one, other = ({name: d for name, d in known.items() if d.of.key in common} for known, _ in found)
    for _, left_out in found:
        skipped.update({key: why for key, why in left_out.items() if key in common})
    weights = {}
    for key in one:
        if key not in other:
            skipped[key] = "of another form in the other adapter"
            continue
        first, second = one[key].side(side)[:, :top], other[key].side(side)[:, :top]
        if first.shape[0] != second.shape[0]:
            raise AdapterError(f"{key}: {first.shape[0]} dimensions in one adapter, {second.shape[0]} in the other")
        if not first.shape[1] or not second.shape[1]:
            skipped[key] = "one of the two does not change it at all"
            continue
        weights[key] = subspace_similarity(first, second)
    return Similarities(weights, dict(sorted(skipped.items())), side)


def _in_common(a: Adapter, b: Adapter) -> list[str]:
    for adapter in (a, b):
        check_adapter(adapter, "similarity")
    common = [key for key in a.changes if key in b.changes]
    if not common:
        raise ConfigError(
            f"the two adapters change no weight in common ({next(iter(a.changes), 'nothing')}, ... and "
            f"{next(iter(b.changes), 'nothing')}, ...): there is nothing to compare"
        )
    return common


def _of_factors(adapter: Adapter, base: Base | None) -> Found:
    """Directions of the factors themselves: U from B's own SVD, Vh from A's own."""
    found: dict[str, Directions] = {}
    skipped: dict[str, str] = {}
    for key, change in adapter.changes.items():
        product = as_product(change) if len(change.matrix_shape) == 2 else None
        if product is None:
            skipped[key] = "has no factors A and B of its own"
            continue
        matter = Matter(key, change)
        U, S, Vh = torch.linalg.svd(product.left.double(), full_matrices=False)
        left = without_noise(U, S, Vh, matter)
        U, S, Vh = torch.linalg.svd(product.right.double(), full_matrices=False)
        right = without_noise(U, S, Vh, matter)
        found[key] = Directions(left.U, left.S, right.Vh, matter)
    return found, skipped
