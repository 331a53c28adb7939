"""nn.ConvTranspose1d, 2d and 3d: the weight (in, out/groups, *kernel) as the matrix (out, in/groups · kernel).

ΔW = B A is a transposed convolution by A (stride, output padding and all) and then a 1x1 convolution by B. Under groups
every group of channels meets the same A, and B's rows stay in their group. PEFT has no such layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.layers.conv import ConvMatrix, cheaper_changed, random


class ConvTransposeMatrix(ConvMatrix):
    """A transposed convolution's weight as the matrix (out, in/groups · kernel)."""

    out_channels: int

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        out: int = layer.out_channels  # type: ignore[assignment]
        return {"weight": (out, layer.weight.numel() // out)}  # type: ignore[operator]

    def to_matrix(self, site: str, stored: Tensor) -> Tensor:
        by_group = stored.reshape(self.groups, -1, *stored.shape[1:])  # (groups, in/groups, out/groups, *kernel)
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)

    def from_matrix(self, site: str, matrix: Tensor) -> Tensor:
        inputs, outputs, *kernel = self.weight.shape
        by_group = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel)
        return by_group.transpose(1, 2).flatten(0, 1)

    def listed_as(self) -> str:
        return f"conv_transpose{self.weight.ndim - 2}d"


class ConvTransposeHost(ConvTransposeMatrix):
    """An adapted transposed convolution."""

    in_channels: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    kernel_size: tuple[int, ...]
    _output_padding: Callable[..., Any]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.active_sites():
            return self.base_class.forward(self, x, output_size)  # type: ignore[no-any-return]
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, self.weight.ndim - 2, self.dilation
        )
        transposed: Any = type(self).convolution
        bias = self.changed_bias()
        terms = self.low_rank()

        def applied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y: Tensor = transposed(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)
            return y

        if not terms or cheaper_changed(self, terms):
            return applied(x, self.changed("weight", dropout=self.training), bias)

        def inner(x: Tensor, A: Tensor) -> Tensor:
            """A(x), (N, groups · rank, *places), by a weight (in/groups, rank, *kernel) for each group."""
            weight = A.to(x.dtype).reshape(len(A), -1, *self.weight.shape[2:]).transpose(0, 1)
            return applied(x, weight.repeat(self.groups, *(1,) * (weight.ndim - 1)))

        return self.with_changes(applied(x, self.weight, bias), x, bias, terms, inner, fresh=True)


@host
class ConvTranspose1dHost(ConvTransposeHost, nn.ConvTranspose1d):
    """An adapted nn.ConvTranspose1d."""

    family: ClassVar[str] = "conv_transpose1d"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d,)
    convolution = staticmethod(F.conv_transpose1d)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("upsampling", lambda: nn.ConvTranspose1d(6, 10, 4, stride=2, padding=1), random(2, 6, 5))
        yield Example(
            "groups",
            lambda: nn.ConvTranspose1d(6, 14, 3, stride=3, groups=2, output_padding=1, dilation=2),
            random(2, 6, 5),
        )
        yield Example(
            "output_size",
            lambda: nn.ConvTranspose1d(4, 8, 3, stride=2, bias=False),
            random(2, 4, 5),
            {"output_size": [12]},
        )


@host
class ConvTranspose2dHost(ConvTransposeHost, nn.ConvTranspose2d):
    """An adapted nn.ConvTranspose2d."""

    family: ClassVar[str] = "conv_transpose2d"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose2d,)
    convolution = staticmethod(F.conv_transpose2d)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example(
            "kernel (3, 2)",
            lambda: nn.ConvTranspose2d(4, 9, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
            random(2, 4, 3, 4),
        )
        yield Example("unbatched groups", lambda: nn.ConvTranspose2d(4, 14, 3, groups=2), random(4, 3, 3))
        yield Example("depthwise", lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, stride=2), random(1, 4, 3, 3))


@host
class ConvTranspose3dHost(ConvTransposeHost, nn.ConvTranspose3d):
    """An adapted nn.ConvTranspose3d."""

    family: ClassVar[str] = "conv_transpose3d"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose3d,)
    convolution = staticmethod(F.conv_transpose3d)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example(
            "kernel (3, 2, 1)",
            lambda: nn.ConvTranspose3d(4, 14, (3, 2, 1), stride=2, padding=(1, 0, 0), output_padding=1, groups=2),
            random(2, 4, 2, 3, 2),
        )
