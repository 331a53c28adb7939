"""nn.Linear: y = x Wᵀ + b, the layer that LoRA was written for.

Low-rank changes go to the fused operation beside the frozen product; any other change goes through W + ΔW. Subclasses
that keep nn.Linear's forward count as nn.Linear; for those with a forward of their own see own_forward.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.layers.output import OutputHost
from deltaw.ops.linear import adapted_linear


@host
class LinearHost(OutputHost, nn.Linear):
    """An adapted nn.Linear."""

    family: ClassVar[str] = "linear"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    takes_forms: ClassVar[bool] = True

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": (layer.out_features, layer.in_features)}  # type: ignore[dict-item]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("linear", lambda: nn.Linear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))
        yield Example(
            "no bias", lambda: nn.Linear(41, 9, bias=False), lambda dtype: (torch.randn(2, 3, 41, dtype=dtype),)
        )
        yield Example("one feature", lambda: nn.Linear(1, 1), lambda dtype: (torch.randn(4, 1, dtype=dtype),))
        yield Example("one vector", lambda: nn.Linear(6, 4), lambda dtype: (torch.randn(6, dtype=dtype),))
        yield Example("empty batch", lambda: nn.Linear(6, 4), lambda dtype: (torch.randn(0, 6, dtype=dtype),))
        yield Example("strided", lambda: nn.Linear(6, 4), lambda dtype: (torch.randn(6, 5, dtype=dtype).T,))
        yield Example("zero row", zero_row, lambda dtype: (torch.randn(3, 6, dtype=dtype),))

    def forward(self, x: Tensor) -> Tensor:
        form = self.form("weight")
        weight = self.weight if form is None else None
        if not self.active_sites():
            return adapted_linear(x, weight, self.bias, (), training=self.training, frozen=form)
        bias = self.changed_bias()
        terms = self.low_rank()
        if terms is None:
            return nn.functional.linear(x, self.changed("weight"), bias)
        return adapted_linear(x, weight, bias, terms, training=self.training, frozen=form)


def zero_row() -> nn.Module:
    """A Linear with a row of zeros, whose length has no direction."""
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    return layer
