"""NF4: 4-bit NormalFloat with blockwise scales (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3).

The 16 values are quantiles of a normal distribution, asymmetric so that zero is exact: eight for the positive side and
seven for the negative one, between probability 1/2 and δ, divided by the largest. Weights are taken in blocks of 64 in
storage order, each divided by its largest absolute value and given the nearest of the 16. `double` keeps those scales in
8 bit as well (the paper's double quantisation): blocks of 256 of them, less their mean, as 8-bit floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.core import options
from deltaw.core.frozen import Form, FrozenWeight
from deltaw.core.registry import form
from deltaw.errors import ConfigError
from deltaw.ops.matmul import linear
from deltaw.ops.terms import flat

DELTA = 0.9677083
"""1 - (1/32 + 1/30) / 2, as the authors' code rounds it: the probability up to which quantiles are taken."""
SCALES_PER_BLOCK = 256
FLOAT8_MAX = 448.0


def normal_float_4() -> Tensor:
    """The 16 values in ascending order, fp32 (16,): -1 ... 0 ... 1."""
    positive = torch.special.ndtri(torch.linspace(DELTA, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(DELTA, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return (values / values.max()).float()


@form
@dataclass(frozen=True, kw_only=True, repr=False)
class NF4(Form):
    """4-bit NormalFloat.

    block: weights that share a scale. double: keep the scales in 8 bit (4.127 instead of 4.5 bits per weight).

    Raises:
        ConfigError: block is no even number above 0.
    """

    kind: ClassVar[str] = "nf4"

    block: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        options.positive_int("block", self.block)
        options.boolean("double", self.double)
        if self.block % 2:
            raise ConfigError(f"NF4(block={self.block}): two codes share a byte, so the block must be even")

    def keep(self, weight: Tensor) -> FrozenWeight:
        return NF4Weight(self, weight)

    @classmethod
    def examples(cls) -> Iterable[Form]:
        return (cls(), cls(block=16, double=True))


class NF4Weight(FrozenWeight):
    """`codes` uint8 (bytes,): two codes each, the first in the high half. `scales`: one per block, fp32 or 8 bit.

    With 8-bit scales, `outer` fp32 (blocks / 256,) are theirs and `mean` fp32 () was taken away from them first.
    """

    form: NF4
    scales: Tensor
    outer: Tensor | None
    mean: Tensor | None
    pairs: Tensor

    def __init__(self, form: NF4, weight: Tensor) -> None:
        super().__init__(form, weight)
        values = normal_float_4().to(weight.device)
        flat = weight.detach().float().reshape(-1)
        blocks = F.pad(flat, (0, -len(flat) % form.block)).reshape(-1, form.block)
        scales = blocks.abs().amax(1)  # (blocks,)
        edges = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / scales.clamp_min(1e-38)[:, None], edges).to(torch.uint8).reshape(-1)
        self.register_buffer("codes", codes[0::2] << 4 | codes[1::2])
        outer = mean = None
        if form.double:
            mean = scales.mean()
            groups = F.pad(scales - mean, (0, -len(scales) % SCALES_PER_BLOCK)).reshape(-1, SCALES_PER_BLOCK)
            outer = groups.abs().amax(1).clamp_min(1e-38)
            eight = (groups / outer[:, None] * FLOAT8_MAX).to(torch.float8_e4m3fn)
            scales = eight.reshape(-1)[: len(scales)].clone().view(torch.uint8)
        self.register_buffer("scales", scales)
        self.register_buffer("outer", outer)
        self.register_buffer("mean", mean)
        both = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)  # (256, 2): the values of every byte
        self.register_buffer("pairs", both, persistent=False)

    def block_scales(self) -> Tensor:
        """The scale of every block, fp32 (blocks,)."""
        if self.outer is None or self.mean is None:
            return self.scales
        eight = self.scales.view(torch.float8_e4m3fn).float() / FLOAT8_MAX
        return eight * self.outer.repeat_interleave(SCALES_PER_BLOCK)[: len(eight)] + self.mean

    def dense(self) -> Tensor:
        values = self.pairs.index_select(0, self.codes.to(torch.int32)).reshape(-1, self.form.block)
        whole = (values * self.block_scales()[:, None]).reshape(-1)
        return whole[: math.prod(self.shape)].reshape(self.shape).to(self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return linear(flat(x), self.dense().to(x.dtype)).view(*x.shape[:-1], self.shape[0])

    def matmul_grad(self, g: Tensor) -> Tensor:
        return linear(flat(g), self.dense().to(g.dtype).t()).view(*g.shape[:-1], self.shape[1])
