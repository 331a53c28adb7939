"""Full: a trained copy of a parameter, so that modules trained in full switch, merge and detach like any other change.

W + ΔW = V, the copy. It suits a parameter (or buffer) of any shape, of any module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.registry import variant
from deltaw.core.variant import Delta, FrozenMatrix, Site, Variant
from deltaw.errors import ModelError


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class Full(Variant):
    """A trained copy of the parameter; what `train=` gives to every parameter of the modules it names."""

    kind: ClassVar[str] = "full"
    any_shape: ClassVar[bool] = True

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return FullDelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors["value"].shape)


class FullDelta(Delta):
    """`value`: the parameter that stands in for the frozen one, in its stored shape."""

    value: Tensor

    def __init__(self, variant: Full, site: Site) -> None:
        super().__init__(variant, site)
        value = torch.empty(site.shape, dtype=site.dtype, device=site.device)
        if site.buffer:
            self.register_buffer("value", value)
        else:
            self.value = nn.Parameter(value)

    def start(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            self.value.copy_(frozen.dense())

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.value - weight

    def new_weight(self, weight: Tensor) -> Tensor:
        if self.value.shape != weight.shape:
            raise ModelError(
                f"a parameter is {tuple(weight.shape)} now and was {tuple(self.value.shape)} when its trained copy was made: "
                "resize the model (as resize_token_embeddings does) before attaching or loading"
            )
        return self.value.to(weight.dtype)
