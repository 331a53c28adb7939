"""linear: average the factors, not the changes: PEFT's "linear" (LoRAHub, arXiv:2307.13269, with wᵢ for its root).

A = Σ sgn(wᵢsᵢ) √|wᵢsᵢ| Aᵢ and B = Σ √|wᵢsᵢ| Bᵢ, so BA = Σ wᵢsᵢ BᵢAᵢ plus a cross term BᵢAⱼ for every pair. It keeps
the rank, but it is not the sum of the changes, and it depends on how each adapter happens to split its ΔW between A
and B. It is here to read what others combined that way; `.error` says how far it is from the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltaw.compose.cat import weighted_sum
from deltaw.compose.combiner import Combiner, Term, combiner
from deltaw.core.true_change import Matrix
from deltaw.errors import ConfigError
from deltaw.ops.product import Product


@combiner
@dataclass(frozen=True, kw_only=True, repr=False)
class Linear(Combiner):
    """Factor-wise weighted average; factors of a smaller rank are filled up with zeros."""

    kind: ClassVar[str] = "linear"
    default_rank: ClassVar[str] = "max"
    keeps_one: ClassVar[bool] = True

    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        products = [t.change for t in terms if isinstance(t.change, Product)]
        if len(products) < len(terms):
            raise ConfigError(
                f"how='linear' averages factors, and a change of {key} has none (DoRA and trained copies depend on the "
                f"base weight): use how='svd'"
            )
        widest = max(p.width for p in products)
        left = torch.zeros(products[0].shape[0], widest, dtype=torch.float64, device=products[0].left.device)
        right = torch.zeros(widest, products[0].shape[1], dtype=torch.float64, device=products[0].left.device)
        for term, product in zip(terms, products):
            strength = term.weight * product.scale
            root = math.sqrt(abs(strength))
            left[:, : product.width] += root * product.left.double()
            right[: product.width] += math.copysign(root, strength) * product.right.double()
        return Product(left, right)

    def blend_any_shape(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        return weighted_sum(terms)
