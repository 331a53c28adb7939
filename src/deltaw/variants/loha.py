"""LoHa: ΔW = scale · (B1 A1) ∘ (B2 A2), a product entry by entry of two low-rank matrices (arXiv:2108.06098, FedPara).

Its rank can reach rank², with the parameters of two LoRAs. A convolution's Tucker form in LyCORIS files is the same with
A = core · input factor; a reader multiplies these out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import inits, variant
from deltaw.core.variant import Delta, FrozenMatrix, Site, Variant
from deltaw.errors import AdapterError
from deltaw.ops.rank_dropout import keep_all, keep_ranks


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class LoHa(Variant):
    """Low-rank Hadamard adaptation, ΔW = alpha/rank · (B1 A1) ∘ (B2 A2).

    rank: of each of the two products. alpha: numerator of the scale; None means 2 x rank.
    rank_dropout: probability of leaving out, in one training call, each of the rows of ΔW (the others grow by 1/(1-p)).
    module_dropout: probability of leaving out the whole change in one training call (nothing grows).

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "loha"

    rank: int = 8
    alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        options.positive_int("rank", self.rank)
        if self.alpha is not None:
            options.positive("alpha", self.alpha)
        options.probability("rank_dropout", self.rank_dropout)
        options.probability("module_dropout", self.module_dropout)
        options.boolean("bias", self.bias)

    @property
    def scale(self) -> float:
        """The factor in front of the product."""
        return 2.0 if self.alpha is None else float(self.alpha) / self.rank

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return cls(rank=3, alpha=5), cls(rank=11, rank_dropout=0.5, module_dropout=0.5, bias=True)

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return LoHaDelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        A1, B1, A2, B2 = (tensors[n] for n in ("A1", "B1", "A2", "B2"))
        ranks = {A1.shape[-2], A2.shape[-2], B1.shape[-1], B2.shape[-1]}
        if A1.shape != A2.shape or B1.shape != B2.shape or ranks != {self.rank}:
            raise AdapterError(
                f"{self}: A1 and A2 must be ({self.rank}, in), B1 and B2 (out, {self.rank}), found "
                f"{tuple(A1.shape)}, {tuple(A2.shape)}, {tuple(B1.shape)} and {tuple(B2.shape)}"
            )
        return (*B1.shape[:-1], A1.shape[-1])


class LoHaDelta(Delta):
    """A1 and A2 (rank, in), B1 and B2 (out, rank). A2 starts at zero, the others as LoRA's A."""

    variant: LoHa

    def __init__(self, variant: LoHa, site: Site) -> None:
        super().__init__(variant, site)
        *stack, out, columns = site.shape
        A = torch.empty(*stack, variant.rank, columns, dtype=site.dtype, device=site.device)
        B = torch.empty(*stack, out, variant.rank, dtype=site.dtype, device=site.device)
        self.A1, self.B1 = nn.Parameter(A), nn.Parameter(B)
        self.A2, self.B2 = nn.Parameter(torch.empty_like(A)), nn.Parameter(torch.empty_like(B))

    def start(self, frozen: FrozenMatrix) -> None:
        random = inits["kaiming"]
        random(self.B1, self.A2)  # fills the first, zeroes the second
        random(self.B2, self.A2)
        random(self.A1, self.A2)

    def delta_weight(self, weight: Tensor) -> Tensor:
        v = self.variant
        change: Tensor = v.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)
        return dropped_rows(change, v.rank_dropout, v.module_dropout) if self.training else change


def dropped_rows(change: Tensor, p: float, p_all: float) -> Tensor:
    """ΔW (..., out, in) with each row left out with probability p (the others grow), all of it with probability p_all."""
    if p:
        change = change * keep_ranks(change.shape[-2], p, change)[:, None]
    return change * keep_all(p_all, change) if p_all else change
