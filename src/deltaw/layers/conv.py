"""nn.Conv1d, 2d and 3d: the matrix is (out, in/groups · kernel), ΔW = B A a convolution by A and then a 1x1 one by B.

A convolves as the layer does (stride, padding and its mode, dilation); under true groups every group of channels meets
the same A, and B's rows stay in their group. (PEFT's A reaches across the groups instead: another, dense change.)

Subclasses that only override `_conv_forward` (openai-whisper's Conv1d casts the weight there) keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.core.variant import LowRank
from deltaw.layers.output import OutputHost, dropped_input, plus
from deltaw.ops.places import is_product, multiplies, plus_product_by_places, product_by_places
from deltaw.ops.seeded import seeded_dropout
from deltaw.ops.select import WIDE, is_small_kernel

Convolved = Callable[[Tensor, Tensor], Tensor]
"""x (N, in, *places) and A -> A(x), (N, groups · rank, *places)."""


class ConvMatrix(OutputHost):
    """A convolution's weight (out, in/groups, *kernel) as the matrix (out, in/groups · kernel)."""

    groups: int
    in_channels: int
    convolution: ClassVar[Callable[..., Tensor]]

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        out, *rest = layer.weight.shape  # type: ignore[misc]
        return {"weight": (int(out), int(torch.Size(rest).numel()))}

    def to_matrix(self, site: str, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def from_matrix(self, site: str, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight.shape)

    def with_changes(
        self, y: Tensor, x: Tensor, bias: Tensor | None, terms: list[LowRank], inner: Convolved, fresh: bool
    ) -> Tensor:
        """y + Σ ( gain ⊙ (y - bias) + scale · B A(x) ), in y's dtype: the frozen output y, (N, out, *places), with its changes.

        One sample comes without N. fresh: nobody keeps y. With gain = 0 and B = 0 the result is y to the bit.
        """
        behind = self.weight.ndim - 2
        if y.dim() == behind + 1:
            return self.with_changes(y[None], x[None], bias, terms, inner, fresh)[0]
        gains = [t.gain for t in terms if t.gain is not None]
        if gains:
            y, fresh = gained(y, bias, sum(gains[1:], gains[0])), True
        for t in terms:
            rank = t.A.shape[0]
            if not rank:  # a gain alone
                continue
            h = inner(dropped_input(x, t, self.training), t.A)
            drops = self.training and t.dropout > 0 and t.dropout_at == "output"
            if self.groups == 1 and not drops and is_product(math.prod(y.shape[2:])):
                y = plus_product_by_places(y, h, t.B, t.scale, fresh=fresh)
            else:
                one, none = (1,) * behind, (0,) * behind
                B = (t.scale * t.B).to(h.dtype).reshape(-1, rank, *one)
                change = torch.convolution(h, B, None, one, none, one, False, none, self.groups)
                y = plus(y, seeded_dropout(change, t.dropout) if drops else change)
            fresh = True
        return y

    def listed_as(self) -> str:
        name = f"conv{self.weight.ndim - 2}d"
        return name if self.groups == 1 else f"{name} (grouped)"


class ConvHost(ConvMatrix):
    """An adapted convolution of any number of dimensions."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if not self.active_sites():
            return self._conv_forward(x, self.weight, self._parameters["bias"])
        bias = self.changed_bias()
        terms = self.low_rank()
        changed = not terms or cheaper_changed(self, terms)
        weight = self.changed("weight", dropout=self.training) if changed else self.weight
        plain = self.is_plain()
        if plain and terms and x.dim() == weight.dim() and self.is_pointwise() and multiplies(x, weight, terms):
            y = product_by_places(weight.flatten(1), self.points(x), bias)
        else:
            y = self._conv_forward(x, weight, bias)
        if changed or not terms:
            return y
        return self.with_changes(y, x, bias, terms, self.inner, fresh=plain)  # torch's own convolution keeps no y

    def is_plain(self) -> bool:
        """Whether `_conv_forward` is torch's own, neither a subclass's nor this layer's alone."""
        own = self.adapts[0]._conv_forward  # type: ignore[attr-defined]
        return "_conv_forward" not in self.__dict__ and type(self)._conv_forward is own

    def inner(self, x: Tensor, A: Tensor) -> Tensor:
        """A(x), (N, groups · rank, *places)."""
        A = A.to(x.dtype).reshape(-1, *self.weight.shape[1:])  # (rank, in/groups, *kernel)
        points = self.points(x) if self.is_pointwise() else None
        if points is not None and is_product(math.prod(points.shape[2:])):
            return product_by_places(A.flatten(1), points)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        if self.groups > 1:
            A = A.repeat(self.groups, *(1,) * (A.dim() - 1))  # (groups · rank, in/groups, *kernel)
        convolution: Any = type(self).convolution
        h: Tensor = convolution(x, A, None, self.stride, padding, self.dilation, self.groups)
        return h

    def is_pointwise(self) -> bool:
        """Whether every place of the output sees one place of the input, with all of its channels."""
        return (
            self.groups == 1
            and set(self.weight.shape[2:]) == {1}
            and self.padding_mode == "zeros"
            and self.padding in (0, "same", "valid", (0,) * (self.weight.dim() - 2))
        )

    def points(self, x: Tensor) -> Tensor:
        """The places of x that a pointwise convolution sees."""
        every: Any = (..., *(slice(None, None, step) for step in self.stride))
        return x[every]


def gained(y: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """y + gain ⊙ (y - bias) for y (N, out, *places) and gain (out,), in y's dtype."""
    gain = gain.reshape(-1, *(1,) * (y.dim() - 2))
    if bias is None:
        return (y * (1 + gain)).to(y.dtype)
    return plus(y, gain * (y - bias.to(y.dtype).view_as(gain)))


def cheaper_changed(layer: ConvMatrix, terms: list[LowRank]) -> bool:
    """Whether W + ΔW costs less than the factors: by the rule of `ops/select.py`, and where the groups times the rank are
    no less than the outputs.

    Not with dropout in force, nor under autocast, which would round W + ΔW to 16 bit and swallow a small change.
    """
    weight = layer.weight
    if (layer.training and any(t.dropout for t in terms)) or torch.is_autocast_enabled(weight.device.type):
        return False
    many = sum(t.A.shape[0] for t in terms) * layer.groups >= weight.shape[0]
    return weight.dtype in WIDE and (many or is_small_kernel(weight.numel()))


def random(*shape: int) -> Callable[[torch.dtype], tuple[Tensor]]:
    """The arguments of an example's call: one random tensor."""
    return lambda dtype: (torch.randn(*shape, dtype=dtype),)


@host
class Conv1dHost(ConvHost, nn.Conv1d):
    """An adapted nn.Conv1d."""

    family: ClassVar[str] = "conv1d"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d,)
    convolution = staticmethod(F.conv1d)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("conv1d", lambda: nn.Conv1d(4, 12, 3, stride=2, padding=1), random(2, 4, 9))
        yield Example("unbatched", lambda: nn.Conv1d(4, 12, 3), random(4, 9))
        yield Example(
            "reflect", lambda: nn.Conv1d(4, 12, 5, padding="same", dilation=2, padding_mode="reflect"), random(2, 4, 9)
        )
        yield Example("depthwise", lambda: nn.Conv1d(6, 6, 3, groups=6, padding=1, bias=False), random(2, 6, 9))
        yield Example("groups", lambda: nn.Conv1d(4, 14, 3, groups=2, padding=2), random(2, 4, 9))


@host
class Conv2dHost(ConvHost, nn.Conv2d):
    """An adapted nn.Conv2d."""

    family: ClassVar[str] = "conv2d"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    convolution = staticmethod(F.conv2d)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("conv2d", lambda: nn.Conv2d(3, 10, (3, 2), stride=(2, 1), padding=(1, 0)), random(2, 3, 7, 6))
        yield Example("dilated", lambda: nn.Conv2d(3, 10, 3, padding=2, dilation=2), random(2, 3, 7, 6))
        yield Example("valid", lambda: nn.Conv2d(3, 10, 3, padding="valid", bias=False), random(2, 3, 7, 6))
        yield Example("same", lambda: nn.Conv2d(3, 10, (4, 3), padding="same"), random(2, 3, 7, 6))
        for mode in ("reflect", "replicate", "circular"):
            yield Example(mode, conv2d_padded(mode), random(2, 3, 7, 6))
        yield Example("1x1", lambda: nn.Conv2d(5, 8, 1), random(2, 5, 3, 3))
        yield Example(
            "groups", lambda: nn.Conv2d(4, 14, 3, groups=2, padding=1, padding_mode="circular"), random(2, 4, 5, 5)
        )
        yield Example("depthwise", lambda: nn.Conv2d(3, 12, 3, groups=3), random(2, 3, 5, 5))
        yield Example("no samples", lambda: nn.Conv2d(3, 8, 3), random(0, 3, 5, 5))


@host
class Conv3dHost(ConvHost, nn.Conv3d):
    """An adapted nn.Conv3d."""

    family: ClassVar[str] = "conv3d"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv3d,)
    convolution = staticmethod(F.conv3d)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("conv3d", lambda: nn.Conv3d(2, 7, (2, 3, 1), stride=(1, 2, 1), padding=1), random(1, 2, 4, 5, 3))
        yield Example(
            "replicate",
            lambda: nn.Conv3d(4, 8, 3, groups=2, padding=1, padding_mode="replicate"),
            random(1, 4, 4, 3, 3),
        )


def conv2d_padded(mode: str) -> Callable[[], nn.Module]:
    """A Conv2d whose padding continues the image by `mode`."""
    return lambda: nn.Conv2d(3, 10, 3, stride=2, padding=(1, 2), padding_mode=mode)  # type: ignore[arg-type]
