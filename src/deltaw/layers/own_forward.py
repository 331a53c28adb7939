"""Subclasses of Linear, Embedding and the convolutions with a forward of their own, which stays in charge.

How such a forward uses its weight decides how a change is added:
1. It only calls `super().forward` (Gemma's scaled embedding), as its code says and a trial shows: the host is mixed in
   beneath it, so that the adapted layer is what `super()` finds. Low-rank changes keep their fast way.
2. A Linear that multiplies by the weight itself (openai-whisper's casts it): low-rank terms are added to what it
   returns. Whether that is the same as the forward on W + ΔW (law 1) is tried out on a probe input.
3. Anything else runs on W + ΔW. A forward whose output does not depend on its weight is refused.

Which of them it is, ways.py finds out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.host import Example, Host
from deltaw.core.registry import host
from deltaw.core.twin import shell
from deltaw.core.variant import LowRank
from deltaw.layers.conv import ConvMatrix
from deltaw.layers.conv_transpose import ConvTransposeMatrix
from deltaw.layers.embedding import EmbeddingHost, EmbeddingMatrix
from deltaw.layers.linear import LinearHost, is_foreign
from deltaw.layers.output import OutputHost, added, dropped_input
from deltaw.layers.ways import Way, own_forwards, way_of
from deltaw.layers.weight import WeightHost


class OwnForwardHost(Host):
    """A subclass of a class in `adapts` with a forward of its own, which takes a change in one of the `ways`."""

    ways: ClassVar[tuple[Way, ...]]

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        return any(issubclass(kind, plain) and own_forwards(kind, plain) for plain in cls.adapts)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return any(way_of(layer, plain) in cls.ways for plain in cls.adapts)


@host
class LinearBeneathHost(OwnForwardHost, LinearHost):
    """A subclass of nn.Linear whose own forward calls `super().forward`."""

    family: ClassVar[str] = "linear (beneath own forward)"
    beneath: ClassVar[bool] = True
    ways: ClassVar[tuple[Way, ...]] = ("beneath",)
    takes_forms: ClassVar[bool] = False  # the forward above may read the weight

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("scaled", lambda: ScaledLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))

    def listed_as(self) -> str:
        return LinearHost.family


@host
class EmbeddingBeneathHost(OwnForwardHost, EmbeddingHost):
    """A subclass of nn.Embedding whose own forward calls `super().forward`."""

    family: ClassVar[str] = "embedding (beneath own forward)"
    beneath: ClassVar[bool] = True
    ways: ClassVar[tuple[Way, ...]] = ("beneath",)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("scaled", lambda: ScaledEmbedding(9, 4), lambda dtype: (torch.tensor([[1, 8], [0, 1]]),))


@host
class OwnForwardLinearHost(OwnForwardHost, OutputHost):
    """A subclass of nn.Linear that multiplies by its weight in a forward of its own."""

    family: ClassVar[str] = "linear (own forward)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    ways: ClassVar[tuple[Way, ...]] = ("added", "unused")

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return super().accepts(layer) and not is_foreign(layer)

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": (layer.out_features, layer.in_features)}  # type: ignore[dict-item]

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        if way_of(layer, nn.Linear) == "unused":
            return "its own forward does not depend on its weight, so that a change would have no effect"
        return None

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("casting", lambda: CastingLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sites = self.active_sites()
        own = self.base_class.forward
        if not sites:
            return own(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        terms = self.low_rank()
        if not terms or args or kwargs:  # what further arguments do to the weight, the probe has not seen
            tensors: dict[str, Tensor | None] = {s: self.changed(s, dropout=self.training) for s in sites}
            return own(shell(self, self.base_class, tensors), x, *args, **kwargs)  # type: ignore[no-any-return]
        bias = self.changed_bias()
        y: Tensor = own(shell(self, self.base_class, {"bias": bias}) if "bias" in sites else self, x)

        def low(t: LowRank) -> Tensor:
            inputs = dropped_input(x.to(t.A.dtype), t, self.training)
            return nn.functional.linear(nn.functional.linear(inputs, t.A), t.B)

        return added(y, bias, terms, low, training=self.training)


@host
class ForeignLinearHost(OwnForwardLinearHost):
    """A Linear whose weight bitsandbytes or torchao keep quantised (frozen/foreign.py): its own product stays in charge."""

    family: ClassVar[str] = "linear (quantised by another library)"
    foreign: ClassVar[bool] = True

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        return issubclass(kind, nn.Linear)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and is_foreign(layer)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return None

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return ()

    def listed_as(self) -> str:
        return LinearHost.family

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "weight" in self.active_sites() and self.low_rank() is None:
            return nn.functional.linear(x, self.changed("weight").to(x.dtype), self.changed_bias())
        return super().forward(x, *args, **kwargs)


class ChangedHost(OwnForwardHost, WeightHost):
    """A layer whose own forward runs on W + ΔW."""

    ways: ClassVar[tuple[Way, ...]] = ("changed",)


@host
class ChangedLinearHost(ChangedHost, OutputHost):
    """A subclass of nn.Linear that does something else with its weight than to multiply by it."""

    family: ClassVar[str] = "linear (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("normed weight", lambda: NormedLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))


@host
class ChangedEmbeddingHost(ChangedHost, EmbeddingMatrix):
    """A subclass of nn.Embedding that reads its weight itself (positions by slicing, as HF's Whisper)."""

    family: ClassVar[str] = "embedding (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("positions", lambda: PositionEmbedding(9, 4), lambda dtype: (torch.zeros(2, 5),))


@host
class ChangedConvHost(ChangedHost, ConvMatrix):
    """A subclass of a convolution with a forward of its own (weight standardisation)."""

    family: ClassVar[str] = "convolution (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ways: ClassVar[tuple[Way, ...]] = ("beneath", "changed")

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example(
            "standardised", lambda: StandardConv(3, 6, 3), lambda dtype: (torch.randn(2, 3, 5, 5, dtype=dtype),)
        )


@host
class ChangedConvTransposeHost(ChangedHost, ConvTransposeMatrix):
    """A subclass of a transposed convolution with a forward of its own."""

    family: ClassVar[str] = "transposed convolution (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ways: ClassVar[tuple[Way, ...]] = ("beneath", "changed")


# ---- examples


class CastingLinear(nn.Linear):
    """As openai-whisper's Linear: the weight follows the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class ScaledLinear(nn.Linear):
    """Its own forward scales what nn.Linear gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x.to(self.weight.dtype))


class NormedLinear(nn.Linear):
    """Its own forward uses the weight with rows of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=-1), self.bias)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: scaled by the square root of the width."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype)


class PositionEmbedding(nn.Embedding):
    """As HF's Whisper: a slice of the weight, as long as the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[: x.shape[1]]


class StandardConv(nn.Conv2d):
    """A convolution with a standardised weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        y: Tensor = self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)
        return y
