"""nn.Linear: y = x Wᵀ + b, the layer that LoRA was written for.

How it computes with a change is in product.py. Subclasses that keep nn.Linear's forward count as nn.Linear; for those
with a forward of their own see own_forward.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from deltaw.core.frozen import foreign_dense
from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.layers.product import ProductHost


@host
class LinearHost(ProductHost, nn.Linear):
    """An adapted nn.Linear."""

    family: ClassVar[str] = "linear"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return super().accepts(layer) and not is_foreign(layer)

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


def is_foreign(layer: nn.Module) -> bool:
    """Whether another library keeps the weight in a form of its own."""
    weight = layer._parameters.get("weight")
    return weight is not None and foreign_dense(layer, weight) is not None


def zero_row() -> nn.Module:
    """A Linear with a row of zeros, whose length has no direction."""
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    return layer
