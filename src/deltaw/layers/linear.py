"""nn.Linear: y = x Wᵀ + b, the layer that LoRA was written for.

Low-rank changes go to the fused operation beside the frozen product; any other change goes through W + ΔW. Subclasses
that keep nn.Linear's forward count as nn.Linear; one with its own forward (openai-whisper's casts the weight) keeps it,
and the low-rank terms are added to what it returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.host import Example, Host, shell
from deltaw.core.registry import host
from deltaw.core.variant import LowRank
from deltaw.ops.linear import adapted_linear


class LinearSites(Host):
    """What every layer with one (out, in) weight has in common."""

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": tuple(layer.weight.shape)}  # type: ignore[arg-type]

    def low_rank(self) -> list[LowRank] | None:
        """The active changes of the weight as low-rank terms, or None if one of them is not of that form."""
        terms: list[LowRank] = []
        frozen = self.frozen("weight")
        for delta, weight in self.active("weight"):
            parts = delta.low_rank(frozen)
            if parts is None:
                return None
            if weight == 1.0:
                terms.extend(parts)
            else:
                terms.extend(
                    p._replace(scale=weight * p.scale, gain=None if p.gain is None else weight * p.gain) for p in parts
                )
        return terms


@host
class LinearHost(LinearSites, nn.Linear):
    """An adapted nn.Linear."""

    family: ClassVar[str] = "linear"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

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
        if not self.active_sites():
            return nn.functional.linear(x, self.weight, self.bias)
        bias = self.changed_bias()
        terms = self.low_rank()
        if terms is None:
            return nn.functional.linear(x, self.changed("weight"), bias)
        if not terms:
            return nn.functional.linear(x, self.weight, bias)
        return adapted_linear(x, self.weight, bias, terms, training=self.training)


@host
class OwnForwardLinearHost(LinearSites):
    """An adapted subclass of nn.Linear that has a forward of its own, which stays in charge of the frozen product."""

    family: ClassVar[str] = "linear (own forward)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("casting", lambda: CastingLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))

    def forward(self, x: Tensor) -> Tensor:
        sites = self.active_sites()
        if not sites:
            return super().forward(x)  # type: ignore[no-any-return, misc]
        terms = self.low_rank()
        if terms is None:
            changed: dict[str, Tensor | None] = {"weight": self.changed("weight"), "bias": self.changed_bias()}
            return self.base_class.forward(shell(self, self.base_class, changed), x)  # type: ignore[no-any-return]
        bias = self.changed_bias()
        plain = shell(self, self.base_class, {"bias": bias}) if bias is not self._parameters.get("bias") else None
        y: Tensor = super().forward(x) if plain is None else self.base_class.forward(plain, x)  # type: ignore[misc]
        unbiased = y if bias is None else y - bias.to(y.dtype)
        for t in terms:
            low = _low_rank_output(x, t, self.training)
            y = y + (low if t.gain is None else low + t.gain * unbiased).to(y.dtype)
        return y


def zero_row() -> nn.Module:
    """A Linear with a row of zeros, whose length has no direction."""
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    return layer


class CastingLinear(nn.Linear):
    """A Linear with a forward of its own, as openai-whisper's: the weight follows the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def _low_rank_output(x: Tensor, t: LowRank, training: bool) -> Tensor:
    drop = t.dropout if training else 0.0
    x = x.to(t.A.dtype)
    if drop and t.dropout_at == "input":
        x = nn.functional.dropout(x, drop)
    low: Tensor = torch.mul(nn.functional.linear(nn.functional.linear(x, t.A), t.B), t.scale)
    return nn.functional.dropout(low, drop) if drop and t.dropout_at == "output" else low
