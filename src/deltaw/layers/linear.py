"""nn.Linear: y = x Wᵀ + b, the layer that LoRA was written for.

Low-rank changes go to the fused operation beside the frozen product; any other change goes through W + ΔW. Subclasses
that keep nn.Linear's forward count as nn.Linear; for those with a forward of their own see own_forward.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.frozen import FrozenWeight, foreign_dense
from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.core.roster import Active
from deltaw.layers.output import OutputHost
from deltaw.ops.grouped import Segment, grouped_linear
from deltaw.ops.linear import adapted_linear
from deltaw.ops.select import is_formed


@host
class LinearHost(OutputHost, nn.Linear):
    """An adapted nn.Linear."""

    family: ClassVar[str] = "linear"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    takes_forms: ClassVar[bool] = True

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

    def forward(self, x: Tensor) -> Tensor:
        weight, form = self.dense_or_form(x)
        sites = self.active_sites()
        if not sites:
            return adapted_linear(x, weight, self.bias, (), training=self.training, frozen=form)
        bias = self.changed_bias() if "bias" in sites else self.bias
        terms = self.low_rank()
        if terms is None and form is None:
            return nn.functional.linear(x, self.changed("weight"), bias)
        y = adapted_linear(x, weight, bias, terms or (), training=self.training, frozen=form)
        # over a form, the kept weight's own product and ΔW beside it: a fresh change adds exact zeros
        return y if terms is not None else y + nn.functional.linear(x, self.apart("weight").to(x.dtype))

    def dense_or_form(self, x: Tensor) -> tuple[Tensor | None, FrozenWeight | None]:
        """The frozen weight, or the form in which it is kept; one of the two is None."""
        form = self.form("weight")
        if form is None:
            return self.weight, None
        if torch.compiler.is_compiling() or not is_formed(form.shape[0], form.shape[1]):
            return None, form
        return form.dense().to(x.dtype), None

    def grouped(self, x: Tensor, groups: Sequence[tuple[Active, int, int]]) -> Tensor | None:
        segments = []
        for active, start, stop in groups:
            terms = self.low_rank(active) if active else []
            if terms is None or self.beneath or not self.active_sites(active) <= {"weight"}:
                return None
            segments.append(Segment(start, stop, terms))
        weight, form = self.dense_or_form(x)
        return grouped_linear(x, weight, self.bias, segments, training=self.training, frozen=form)


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
