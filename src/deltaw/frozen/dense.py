"""Dense16: the weight itself in bf16 or fp16. Half the memory of fp32, kept once and never cast per call.

The input is cast to 16 bit for the product (which sums in 32), and the result back: casting the weight instead would
cost a pass over it, and a copy, at every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.core.frozen import Form, FrozenWeight
from deltaw.core.registry import form
from deltaw.errors import ConfigError


@form
@dataclass(frozen=True, kw_only=True, repr=False)
class Dense16(Form):
    """The weight in 16 bit.

    dtype: torch.bfloat16 (the range of fp32, 8 bits of precision) or torch.float16 (11 bits, at most 65504).

    Raises:
        ConfigError: another dtype, or a weight that overflows in fp16.
    """

    kind: ClassVar[str] = "dense16"
    rounding: ClassVar[float] = 1e-2

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"Dense16(dtype={self.dtype}): torch.bfloat16 or torch.float16")

    def keep(self, weight: Tensor) -> FrozenWeight:
        return DenseWeight(self, weight)

    @classmethod
    def examples(cls) -> Iterable[Form]:
        return (cls(), cls(dtype=torch.float16))


class DenseWeight(FrozenWeight):
    """`codes` (out, in) is the rounded weight."""

    form: Dense16

    def __init__(self, form: Dense16, weight: Tensor) -> None:
        super().__init__(form, weight)
        codes = weight.detach().to(form.dtype).contiguous()
        if not bool(torch.isfinite(codes).all()):
            raise ConfigError(f"{form}: a weight of {float(weight.abs().max()):.3g} is beyond its range; use bfloat16")
        self.register_buffer("codes", codes)

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.codes.dtype), self.codes).to(x.dtype)

    def matmul_grad(self, g: Tensor) -> Tensor:
        return (g.to(self.codes.dtype) @ self.codes).to(g.dtype)

    def dense(self) -> Tensor:
        return self.codes.to(self.dtype)
