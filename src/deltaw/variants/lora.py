"""LoRA: W + scale · B A, with A (rank, in), B (out, rank) (Hu et al. 2021, arXiv:2106.09685).

B starts at zero, so a fresh adapter changes nothing. `scale` follows one of three rules: alpha/rank (the paper),
alpha/sqrt(rank) (rsLoRA, arXiv:2312.03732), or plain alpha (S. Raschka's from-scratch code).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import inits, variant
from deltaw.core.variant import Delta, FrozenMatrix, LowRank, Site, Variant
from deltaw.errors import AdapterError

SCALINGS = ("alpha/rank", "alpha/sqrt(rank)", "alpha")


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(Variant):
    """Low-rank adaptation, ΔW = scale · B A.

    rank: number of directions that may change.
    alpha: numerator of the scale; None means 2 x rank.
    scaling: "alpha/rank", "alpha/sqrt(rank)" or "alpha".
    init: how A and B start ("kaiming" as PEFT; "gaussian"; "gaussian/sqrt(rank)"; others in `deltaw.inits`).
    dropout: probability of zeroing, in training, an entry of A's input, or of the change's output with dropout_at="output".

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float | None = None
    scaling: str = "alpha/rank"
    init: str = "kaiming"
    dropout: float = 0.0
    dropout_at: str = "input"

    def __post_init__(self) -> None:
        options.positive_int("rank", self.rank)
        if self.alpha is not None:
            options.positive("alpha", self.alpha)
        options.one_of("scaling", self.scaling, SCALINGS)
        options.one_of("dropout_at", self.dropout_at, ("input", "output"))
        options.probability("dropout", self.dropout)
        options.boolean("bias", self.bias)
        _ = inits[self.init]

    @property
    def scale(self) -> float:
        """The factor in front of B A."""
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        return {"alpha/rank": alpha / self.rank, "alpha/sqrt(rank)": alpha / math.sqrt(self.rank), "alpha": alpha}[
            self.scaling
        ]

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return (
            cls(rank=3, alpha=5),
            cls(rank=40, scaling="alpha/sqrt(rank)", init="gaussian", bias=True),
            cls(rank=1, alpha=0.5, scaling="alpha", init="gaussian/sqrt(rank)", dropout=0.5, dropout_at="output"),
        )

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return LoRADelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        A, B = tensors["A"], tensors["B"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != self.rank or B.shape[1] != self.rank:
            raise AdapterError(
                f"{self}: A must be ({self.rank}, in) and B (out, {self.rank}), found {tuple(A.shape)} and {tuple(B.shape)}"
            )
        return B.shape[0], A.shape[1]


class LoRADelta(Delta):
    """A (rank, in) and B (out, rank) of one weight."""

    fast = ("B",)
    variant: LoRA

    def __init__(self, variant: LoRA, site: Site) -> None:
        super().__init__(variant, site)
        self.A = nn.Parameter(torch.empty(variant.rank, site.columns, dtype=site.dtype, device=site.device))
        self.B = nn.Parameter(torch.empty(site.rows, variant.rank, dtype=site.dtype, device=site.device))

    def start(self, frozen: FrozenMatrix) -> None:
        inits[self.variant.init](self.A, self.B)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.variant.scale * (self.B @ self.A)

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...]:
        v = self.variant
        return (LowRank(self.A, self.B, v.scale, None, v.dropout, v.dropout_at),)
