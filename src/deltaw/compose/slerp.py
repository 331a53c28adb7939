"""slerp: go from one change to another along the arc between their directions (Shoemake 1985), length interpolated.

With a, b the two ΔW of a weight, t = w_b / (w_a + w_b) and ω the angle between them (from ⟨a, b⟩, by factors):
    result = (w_a + w_b) · ((1-t)‖a‖ + t‖b‖) · [sin((1-t)ω)/sin ω · a/‖a‖ + sin(tω)/sin ω · b/‖b‖]
A straight average of two directions is shorter than either; the arc keeps the length. It is a linear combination of a
and b, so the result is as exact as cat's, of rank r_a + r_b. Where the arc is not defined (a or b is zero, or they
point the same or the opposite way) it is the straight line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from deltaw.compose.cat import weighted_sum
from deltaw.compose.combiner import Combiner, Term, combiner
from deltaw.core.true_change import Matrix
from deltaw.errors import ConfigError
from deltaw.ops.product import Product


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class Slerp(Combiner):
    """Spherical interpolation between two adapters; `weights=(1-t, t)`, none negative."""

    kind: ClassVar[str] = "slerp"
    keeps_one: ClassVar[bool] = True

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        if len(terms) > 2 or any(t.weight < 0 for t in terms):
            raise ConfigError(
                f"how='slerp' goes between two adapters with weights (1-t, t), none negative; {key} has {len(terms)} "
                f"changes with weights {[t.weight for t in terms]}: use how='cat' for sums and differences"
            )
        if len(terms) == 1:  # the other adapter does not touch this weight: the straight line to zero
            return weighted_sum(terms)
        a, b = terms
        length_a, length_b, inner = _norm(a.change), _norm(b.change), _inner(a, b)
        size = a.weight + b.weight
        if size == 0 or length_a == 0 or length_b == 0:
            return weighted_sum(terms)
        t = b.weight / size
        angle = math.acos(max(-1.0, min(1.0, inner / (length_a * length_b))))
        if math.sin(angle) < 1e-6:
            return weighted_sum(terms)
        length = size * ((1 - t) * length_a + t * length_b)
        return weighted_sum(
            [
                replace(a, weight=length * math.sin((1 - t) * angle) / math.sin(angle) / length_a),
                replace(b, weight=length * math.sin(t * angle) / math.sin(angle) / length_b),
            ]
        )


def _norm(change: Matrix) -> float:
    return change.norm() if isinstance(change, Product) else float(change.norm())


def _inner(a: Term, b: Term) -> float:
    if isinstance(a.change, Product) and isinstance(b.change, Product):
        return a.change.inner(b.change)
    return float((a.dense() * b.dense()).sum())
