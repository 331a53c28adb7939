"""Products with a frozen weight in 8 bit, forward and for the input gradient, on processors with VNNI.

The weight is kept as codes, one scale per output channel; inputs and gradients are quantised at every call, one scale
per token (a scale for a whole tensor costs accuracy, and would let the rows of a batch influence each other):

    W[n, :] = w[n] Q[n, :]                       w = max|W[n, :]| / 127
    x[t, :] = a[t] (U[t, :] - 128)               a = max|x[t, :]| / 127,  U unsigned
    x Wᵀ    = a[t] w[n] Σ_k (U - 128) Q          whole numbers, exact in 32 bit
    g W     = a[t] Σ_n (V - 128) Q               where a, V quantise g ⊙ w: the derivative of the very W that is used

so that the only errors are the two roundings to 8 bit. A token with NaN or infinity gives no finite number (not always
the one of 32 bit: ∞ or -∞ may come as NaN, as ∞, or with the other sign), and in its own row only.

Projections that read the same x (query, key, value) quantise it once: the codes of the last x are kept, per thread.

The plain twins are `int8_matmul_reference` and `int8_matmul_grad_reference`.
"""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.ops.cpu_thin import Sweep, takes
from deltaw.ops.steps import finish_
from deltaw.ops.terms import flat

LEVELS = 127.0
TINY = 1e-35
"""The smallest maximum of a token: keeps the reciprocal finite for rows of zeros."""

ROUNDING = float((1 << 23) + (1 << 22) + 128)
"""Near it the numbers of 32 bit lie 1 apart."""

BLOCK = 1 << 18
"""Numbers quantised at a time: the block and its copy stay in the second-level cache through the passes over it."""


class Packed(NamedTuple):
    """Codes (n, k) in oneDNN's own order, and a scale and a zero point for each of the n outputs."""

    codes: Tensor
    channels: Tensor
    zeros: Tensor


def packed(codes: Tensor, channels: Tensor) -> Packed:
    """`codes` int8 (n, k) and their outputs' scales, fp32 (n,), for `product`."""
    return Packed(torch.ops.onednn.qlinear_prepack(codes, None), channels, torch.zeros(len(codes), dtype=torch.int32))


@dataclass(frozen=True)
class Int8Weight:
    """A frozen weight in 8 bit. codes: int8 (out, in). scales: fp32 (out,).

    The two packed forms are oneDNN's own, each made when it is first used: who never trains keeps one.
    """

    codes: Tensor
    scales: Tensor

    @cached_property
    def forward(self) -> Packed:
        """As the product with x reads them."""
        return packed(self.codes, self.scales)

    @cached_property
    def backward(self) -> Packed:
        """As the product with g reads them; g was multiplied with the scales."""
        return packed(self.codes.t().contiguous(), torch.ones(self.codes.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed forms that are there."""
        return self.codes.numel() * len({"forward", "backward"} & vars(self).keys())

    def dense(self) -> Tensor:
        """The weight that this stands for, fp32 (out, in)."""
        return self.codes.float() * self.scales[:, None]


def int8_available() -> bool:
    """Whether this machine multiplies 8-bit numbers without intermediate overflow (x86 with VNNI, torch with oneDNN)."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
    )


def quantize_int8(weight: Tensor) -> Int8Weight:
    """`weight` (out, in) for the processor's kernels.

    Raises:
        ConfigError: it is not finite, or there are no such kernels.
    """
    return kernels_of(*quantize_outputs(weight))


def quantize_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (out, in) and scales fp32 (out,): W[n, :] = scale[n] · codes[n, :], scale = max|W[n, :]| / 127.

    Raises:
        ConfigError: the weight is not finite.
    """
    wide = weight.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise ConfigError("a weight that is not finite cannot be kept in 8 bit: found NaN or infinity in it")
    scales = wide.abs().amax(1).clamp_min_(TINY).div_(LEVELS)
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def kernels_of(codes: Tensor, scales: Tensor) -> Int8Weight:
    """What the processor's kernels take; each form of the codes is made when it is first asked for.

    Raises:
        ConfigError: there are no such kernels here.
    """
    if not int8_available():
        raise ConfigError(
            "8-bit products were asked for, but this processor has no VNNI or this torch no oneDNN; keep the weight "
            "dense (or quantize=None)"
        )
    return Int8Weight(codes, scales)


def int8_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (..., in) -> (..., out), in x's dtype."""
    return product(x, weight.forward, None, bias)


def int8_matmul_grad(g: Tensor, weight: Int8Weight) -> Tensor:
    """g W: (..., out) -> (..., in), in g's dtype."""
    return product(g, weight.backward, weight.scales, None)


def product(x: Tensor, weight: Packed, columns: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x ⊙ columns) Qᵀ ⊙ channels + b for the packed codes Q (n, k): (..., k) -> (..., n)."""
    y, scales = unscaled(x, weight, columns)
    finish_(y, scales, None, bias, ())
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def unscaled(x: Tensor, weight: Packed, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same product of whole numbers, fp32 (T, n), and the scale that each of its rows is still to be multiplied with, (T, 1)."""
    n = weight.channels.shape[0]
    if x.numel() == 0:
        rows = math.prod(x.shape[:-1])
        return x.new_zeros(rows, n, dtype=torch.float32), x.new_zeros(rows, 1, dtype=torch.float32)
    codes, scales = codes_of(x) if columns is None else quantize_rows(flat(x), columns)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y, scales


_last = threading.local()
"""The last x that was quantised without columns (weakly), its version and address, and its codes and scales."""


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows(flat(x))`, made once for consecutive calls with the very same x, unchanged.

    Nobody can tell whether x has changed if it has no version (made in inference mode) or its memory is not torch's own
    (NumPy's, or shared with another process): that is quantised at every call.
    """
    last: tuple[weakref.ref[Tensor], tuple[int, int], tuple[Tensor, Tensor]] | None = getattr(_last, "entry", None)
    if x.is_inference() or not x.untyped_storage().resizable() or x.untyped_storage().is_shared():
        return quantize_rows(flat(x))
    state = x._version, x.data_ptr()
    if last is not None and last[0]() is x and last[1] == state:
        return last[2]
    found, mine = quantize_rows(flat(x)), _last.__dict__  # of this thread

    def forget(dead: weakref.ref[Tensor]) -> None:
        if mine.get("entry", (None,))[0] is dead:
            del mine["entry"]

    _last.entry = weakref.ref(x, forget), state, found
    return found


def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x ⊙ columns, (T, k), as unsigned codes (T, k) around 128 and one scale per row, (T, 1), fp32.

    Compiled (thin.c) or in torch's passes: `ROUNDING` plus a number v of at most seven bits has v's nearest whole number, plus 128, in its lowest byte: one pass
    scales and rounds, and one takes the bytes.
    """
    if takes(x, factors=(columns,)):
        sweep = Sweep()
        found = sweep.quantize_rows(x, columns)
        sweep.run()
        return found
    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=torch.uint8)
    scales = torch.empty((rows, 1), dtype=torch.float32)
    step = rows if x.numel() <= 2 * BLOCK else max(1, BLOCK // width)
    buffer = torch.empty((step, width), dtype=torch.float32)
    rounding = torch.full((width,), ROUNDING)
    for start in range(0, rows, step):
        part, work, scale = x[start : start + step], buffer[: rows - start], scales[start : start + step]
        if columns is not None:
            part = torch.mul(part, columns, out=work)
        elif x.dtype != torch.float32:
            part = work.copy_(part)
        torch.maximum(part.amax(1, keepdim=True), part.amin(1, keepdim=True).neg_(), out=scale)
        torch.addcmul(rounding, part, LEVELS / scale.clamp_min_(TINY), out=work)
        codes[start : start + step].copy_(work.view(torch.int32))
    return codes, scales.div_(LEVELS)


def int8_matmul_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by the formula of the header, in float64."""
    whole, a = quantize_reference(x.double())
    y = whole @ codes.double().t() * a * scales.double()
    return y if bias is None else y + bias.double()


def int8_matmul_grad_reference(g: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """g W by the formula of the header, in float64."""
    whole, a = quantize_reference((g.float() * scales).double())
    return whole @ codes.double() * a


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-127, 127] and the scale of each row, (..., 1)."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(TINY)
    return (x * (LEVELS / largest)).round(), largest / LEVELS
