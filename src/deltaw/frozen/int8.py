"""Int8: 8-bit codes, one scale per output channel; inputs and gradients are quantised per token at every call.

Where the processor multiplies 8-bit numbers (ops/int8.py), both products run on the codes, 2-3 times as fast as fp32.
Elsewhere, under `torch.compile` and for fp64, the weight that the codes stand for is formed and multiplied with: the same
function up to the quantisation of the input. The same is done, product by product, where that was timed to be faster or
outliers in the input make 8 bit too inexact (ops/choices.py). A weight whose own outliers do is left as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.frozen import Form, FrozenWeight
from deltaw.core.registry import form
from deltaw.ops.choices import Choices
from deltaw.ops.int8 import (
    TINY,
    Int8Weight,
    int8_available,
    int8_matmul,
    kernels_of,
    quantize_outputs,
    unscaled,
)
from deltaw.ops.matmul import linear
from deltaw.ops.steps import finish_
from deltaw.ops.terms import by_rows, flat

COARSE = 0.05
"""Σ|rounding| / Σ|W| of a weight that 8 bit cannot hold. Normally distributed weights have .008."""


@form
@dataclass(frozen=True, kw_only=True, repr=False)
class Int8(Form):
    """8-bit codes with per-channel scales: W[n, :] = scale[n] · codes[n, :], scale = max|W[n, :]| / 127."""

    kind: ClassVar[str] = "int8"
    rounding: ClassVar[float] = 3e-2

    def keep(self, weight: Tensor) -> FrozenWeight:
        return Int8FrozenWeight(self, weight)

    def objection(self, weight: Tensor, kept: FrozenWeight) -> str | None:
        wide = weight.float()
        moved = float((kept.dense().float() - wide).abs().sum() / wide.abs().sum().clamp_min(TINY))
        return f"outliers: 8 bit would move its entries by {moved:.0%} of their size" if moved > COARSE else None


class Int8FrozenWeight(FrozenWeight):
    """`codes` int8 (out, in), `scales` fp32 (out,). What the processor's kernels need of them is packed at the first use."""

    form: Int8
    scales: Tensor
    choices: Choices

    def __init__(self, form: Int8, weight: Tensor) -> None:
        super().__init__(form, weight)
        codes, scales = quantize_outputs(weight)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales)
        self.choices = Choices()
        self.packed: tuple[Hashable, Int8Weight] | None = None

    def kernels(self, x: Tensor) -> Int8Weight | None:
        """The codes packed for the processor, or None where its kernels cannot be used on `x`."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype == torch.float64 or not int8_available():
            return None
        state = self.state()
        if self.packed is None or state is None or self.packed[0] != state:
            self.packed = state, kernels_of(self.codes, self.scales)
        return self.packed[1]

    def by_rows(self, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """x Wᵀ, or as `gradient` x W, as rows (T, n), and what they have still to be multiplied with, (T, 1)."""
        columns = self.scales if gradient else None

        def wide(rows: Tensor) -> Tensor:
            dense = self.dense().to(rows.dtype)
            return linear(flat(rows), dense.t() if gradient else dense)

        packed = self.kernels(x)
        if packed is None:
            return wide(x), None

        def narrow(rows: Tensor) -> tuple[Tensor, Tensor]:
            return unscaled(rows, packed.backward if gradient else packed.forward, columns)

        y, scales = self.choices.product(
            self.name, "gradient" if gradient else "forward", self.shape, x, narrow, wide, columns
        )
        if scales is None or x.dtype == torch.float32:
            return y, scales
        return y.mul_(scales).to(x.dtype), None

    def product(self, x: Tensor, gradient: bool) -> Tensor:
        """The same, complete and shaped as x."""
        y, scales = by_rows(self, x, gradient)
        finish_(y, scales, None, None, ())
        return y.view(*x.shape[:-1], y.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        return self.product(x, False)

    def matmul_grad(self, g: Tensor) -> Tensor:
        return self.product(g, True)

    def factor_matmul(self, A: Tensor) -> Tensor:
        """In 8 bit too, and by that decides nothing about the layer's inputs."""
        packed = self.kernels(A)
        return self.matmul(A) if packed is None else int8_matmul(A, packed)

    def dense(self) -> Tensor:
        return (self.codes.float() * self.scales[:, None]).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes kept; each product's packed form is one more copy of the codes, once it has run."""
        return super().nbytes + (0 if self.packed is None else self.packed[1].nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}
