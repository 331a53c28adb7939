"""nn.EmbeddingBag: looked-up rows that are summed, averaged or maximised over each bag. PEFT has no such layer.

Its matrix is weightᵀ (dim, number), as nn.Embedding's. Sums and means are linear, so the change of a bag is the bag of
Aᵀ's rows times Bᵀ, and no dense ΔW is formed; a maximum, gradients scaled by frequency, and dropout (of features, one
mask for the call) run with W + ΔW. `max_norm` would write into the frozen weight and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.core.variant import LowRank
from deltaw.layers.embedding import EmbeddingMatrix
from deltaw.layers.output import added

IDS = torch.tensor([[1, 4, 1], [0, 10, 4]])


@host
class EmbeddingBagHost(EmbeddingMatrix, nn.EmbeddingBag):
    """An adapted nn.EmbeddingBag."""

    family: ClassVar[str] = "embedding_bag"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.EmbeddingBag,)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "max_norm writes into the frozen weight" if layer.max_norm is not None else None

    @classmethod
    def examples(cls) -> Iterable[Example]:
        def flat(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return torch.tensor([1, 4, 1, 0, 10, 4]), torch.tensor([0, 2, 2])

        def ended(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return torch.tensor([1, 4, 1, 0, 10, 4]), torch.tensor([0, 2, 6])

        def weighted(dtype: torch.dtype) -> tuple[Tensor, None, Tensor]:
            return IDS, None, torch.randn(2, 3, dtype=dtype)

        for mode in ("mean", "sum", "max"):
            yield Example(f"bags, {mode}", bag(mode=mode), lambda dtype: (IDS,))
        yield Example("offsets and an empty bag", bag(padding_idx=4), flat)
        yield Example("weighted", bag(mode="sum"), weighted)
        yield Example("last offset", bag(include_last_offset=True, scale_grad_by_freq=True), ended)

    def listed_as(self) -> str:
        return self.family

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        def bagged(weight: Tensor, sparse: bool = False) -> Tensor:
            return F.embedding_bag(
                input,
                weight,
                offsets,
                mode=self.mode,
                scale_grad_by_freq=self.scale_grad_by_freq,
                sparse=sparse and weight.is_leaf,
                per_sample_weights=per_sample_weights
                if per_sample_weights is None
                else per_sample_weights.to(weight.dtype),
                include_last_offset=self.include_last_offset,
                padding_idx=self.padding_idx,
            )

        if not self.active_sites():
            return self.base_class.forward(self, input, offsets, per_sample_weights)  # type: ignore[no-any-return]
        terms = self.low_rank()
        linear = self.mode != "max" and not self.scale_grad_by_freq
        if not terms or not linear or (self.training and any(t.dropout for t in terms)):
            return bagged(self.changed("weight", dropout=self.training), self.sparse)

        def low(t: LowRank) -> Tensor:
            return bagged(t.A.mT) @ t.B.mT

        return added(bagged(self.weight), None, terms, low, training=self.training)


def bag(**options: Any) -> Callable[[], nn.Module]:
    """How to build an example's layer."""
    return lambda: nn.EmbeddingBag(11, 6, **options)
