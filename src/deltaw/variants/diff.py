"""Diff: W + D with a dense trained D, of a parameter of any shape (`.diff` of kohya's files, PEFT's lora_bias).

As free as a trained copy (`Full`), but it starts at zero, adds to other changes, and takes a weight in a combination.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.registry import variant
from deltaw.core.variant import Delta, FrozenMatrix, Site, Variant
from deltaw.variants.full import Full


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class Diff(Variant):
    """A dense additive change. A buffer (a running statistic) has no meaningful sum: it is kept as a copy, as by Full."""

    kind: ClassVar[str] = "diff"
    any_shape: ClassVar[bool] = True

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return Full().create(site, shared) if site.buffer else DiffDelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors["diff"].shape)


class DiffDelta(Delta):
    """`diff`: what is added, in the parameter's stored shape."""

    def __init__(self, variant: Diff, site: Site) -> None:
        super().__init__(variant, site)
        self.diff = nn.Parameter(torch.empty(site.shape, dtype=site.dtype, device=site.device))

    def start(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            self.diff.zero_()

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.diff
