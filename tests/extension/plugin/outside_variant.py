"""A method from outside in one file: every entry of W is scaled, by a rank-one pattern. ΔW = W ∘ (u vᵀ)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from deltaw.core.registry import variant
from deltaw.core.variant import Delta, Variant


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class Modulated(Variant):
    """W' = W ∘ (1 + u vᵀ), u (out,) starting at zero, v (in,) at one."""

    kind: ClassVar[str] = "modulated"

    def create(self, site, shared):
        return ModulatedDelta(self, site)

    def matrix_shape(self, tensors):
        return (*tensors["u"].shape, tensors["v"].shape[-1])


class ModulatedDelta(Delta):
    def __init__(self, variant, site):
        super().__init__(variant, site)
        self.u = nn.Parameter(torch.zeros(site.shape[:-1], dtype=site.dtype, device=site.device))
        batch = (*site.shape[:-2], site.shape[-1])
        self.v = nn.Parameter(torch.ones(batch, dtype=site.dtype, device=site.device))

    def delta_weight(self, weight):
        return weight * (self.u.unsqueeze(-1) * self.v.unsqueeze(-2))
