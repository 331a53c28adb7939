"""IA3: every output of the layer, or every input of it, times a trained factor (Liu et al. 2022, arXiv:2205.05638).

W' = diag(l) W and b' = l ∘ b ("output", for keys and values), or W' = W diag(l) ("input", for the second linear layer of
a feed-forward block, whose input is the activation that the paper scales). l starts at one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import variant
from deltaw.core.variant import Delta, FrozenMatrix, LowRank, Site, Variant
from deltaw.errors import AdapterError


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class IA3(Variant):
    """Scaled activations, ΔW = diag(l - 1) W, or W diag(l - 1).

    of: "output" scales what the layer gives, its bias included; "input" scales what it takes.

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "ia3"

    of: str = "output"

    def __post_init__(self) -> None:
        options.one_of("of", self.of, ("output", "input"))
        options.boolean("bias", self.bias)

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return cls(), cls(bias=True), cls(of="input")

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return (OutputDelta if self.of == "output" else InputDelta)(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        l = tensors["l"]
        if l.ndim not in (1, 2):
            raise AdapterError(
                f"{self}: l must be a vector (or one for each of a stack of weights), found {tuple(l.shape)}"
            )
        return (*l.shape, -1) if self.of == "output" else (*l.shape[:-1], -1, l.shape[-1])


class IA3Delta(Delta):
    """l, (out,) or (in,)."""

    def __init__(self, variant: IA3, site: Site) -> None:
        super().__init__(variant, site)
        *stack, out, columns = site.shape
        size = out if variant.of == "output" else columns
        self.l = nn.Parameter(torch.empty(*stack, size, dtype=site.dtype, device=site.device))

    def start(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            self.l.fill_(1.0)


class OutputDelta(IA3Delta):
    """l (out,)."""

    changes_bias = True

    def delta_weight(self, weight: Tensor) -> Tensor:
        return (self.l - 1)[..., None] * weight

    def delta_bias(self, bias: Tensor) -> Tensor:
        return (self.l - 1) * bias

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...] | None:
        if self.l.ndim > 1:
            return None
        gain = self.l - 1
        nothing = gain.new_zeros(1, max(0, self.site.columns)), gain.new_zeros(len(gain), 1)  # B A = 0
        return (LowRank(*nothing, 1.0, gain),)


class InputDelta(IA3Delta):
    """l (in,)."""

    def delta_weight(self, weight: Tensor) -> Tensor:
        return (self.l - 1)[..., None, :] * weight
