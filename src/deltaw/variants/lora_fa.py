"""LoRA-FA: LoRA with A frozen where it started; only B learns (Zhang et al. 2023, arXiv:2308.03303).

Half the gradients and optimizer state of LoRA. What a file keeps is a plain LoRA, which every reader knows: loaded and
trained on, it learns A too, unless the training attaches LoRA-FA again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from deltaw.core.registry import variant
from deltaw.core.variant import Delta, Site, Variant
from deltaw.variants.lora import LoRA, LoRADelta


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class LoRAFA(LoRA):
    """LoRA with a frozen random A. Options as LoRA's."""

    kind: ClassVar[str] = "lora_fa"

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return LoRAFADelta(self, site)


class LoRAFADelta(LoRADelta):
    """B (out, rank) is trained; A (rank, in) is a buffer, so that nothing makes it trainable."""

    A: Tensor  # type: ignore[assignment]

    def __init__(self, variant: LoRAFA, site: Site) -> None:
        super().__init__(variant, site)
        A = self.A.detach()
        del self.A
        self.register_buffer("A", A)

    def resize(self, rank: int) -> None:
        trained = self.B.requires_grad
        self.variant = self.variant.ranked(rank)
        self.A = self.A.new_zeros(*self.A.shape[:-2], rank, self.A.shape[-1])
        self.B = nn.Parameter(self.B.new_zeros(*self.B.shape[:-1], rank), trained)

    def hot(self, variant: Variant, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the LoRA that `kept` makes of it, too."""
        if type(variant) is LoRA:
            variant = LoRAFA(**{f.name: getattr(variant, f.name) for f in fields(LoRA)})
        return super().hot(variant, tensors)

    def kept(self) -> tuple[Variant, dict[str, Tensor]]:
        found, tensors = super().kept()
        return LoRA(**{f.name: getattr(found, f.name) for f in fields(LoRA)}), tensors
