"""Int8: 8-bit codes, one scale per output channel; inputs and gradients are quantised per token at every call.

Where the processor multiplies 8-bit numbers (ops/int8.py), both products run on the codes, 2-3 times as fast as fp32.
Elsewhere, under `torch.compile` and for fp64, the weight that the codes stand for is formed and multiplied with: the same
function up to the quantisation of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.core.frozen import Form, FrozenWeight
from deltaw.core.registry import form
from deltaw.ops.int8 import LEVELS, TINY, Int8Weight, int8_available, int8_matmul, int8_matmul_grad, pack_int8


@form
@dataclass(frozen=True, kw_only=True, repr=False)
class Int8(Form):
    """8-bit codes with per-channel scales: W[n, :] = scale[n] · codes[n, :], scale = max|W[n, :]| / 127."""

    kind: ClassVar[str] = "int8"
    rounding: ClassVar[float] = 3e-2

    def keep(self, weight: Tensor) -> FrozenWeight:
        return Int8FrozenWeight(self, weight)


class Int8FrozenWeight(FrozenWeight):
    """`codes` int8 (out, in), `scales` fp32 (out,). What the processor's kernels need of them is packed at the first use."""

    form: Int8
    scales: Tensor

    def __init__(self, form: Int8, weight: Tensor) -> None:
        super().__init__(form, weight)
        wide = weight.detach().float()
        scales = wide.abs().amax(1).clamp_min(TINY) / LEVELS  # (out, in) -> (out,)
        self.register_buffer("codes", (wide / scales[:, None]).round_().to(torch.int8).contiguous())
        self.register_buffer("scales", scales)
        self.packed: tuple[tuple[int, ...], Int8Weight] | None = None

    def kernels(self, x: Tensor) -> Int8Weight | None:
        """The codes packed for the processor, or None where its kernels cannot be used on `x`."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype == torch.float64 or not int8_available():
            return None
        state = self.codes.data_ptr(), self.codes._version, self.scales.data_ptr(), self.scales._version
        if self.packed is None or self.packed[0] != state:
            self.packed = state, pack_int8(self.codes, self.scales)
        return self.packed[1]

    def matmul(self, x: Tensor) -> Tensor:
        packed = self.kernels(x)
        return F.linear(x, self.dense().to(x.dtype)) if packed is None else int8_matmul(x, packed)

    def matmul_grad(self, g: Tensor) -> Tensor:
        packed = self.kernels(g)
        return g @ self.dense().to(g.dtype) if packed is None else int8_matmul_grad(g, packed)

    def dense(self) -> Tensor:
        return (self.codes.float() * self.scales[:, None]).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes kept; the packed forms are two more copies of the codes, once a product has run."""
        return super().nbytes + (2 * self.codes.numel() if self.packed is not None else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}
