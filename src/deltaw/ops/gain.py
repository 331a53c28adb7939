"""The gain of the adapted linear, y = c z + b + Σ s h Bᵀ with z = x Wᵀ and c = 1 + Σ gain: put into y, and its gradient
read off y (the formula stands in linear.py's header)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaw.ops.matmul import readable

BESIDE = 1 << 17
"""Numbers of the sums that `column_dots` keeps beside each other."""

SMALL_C = 2.0**-6
"""Below this |c| the division by it would cost more than six bits: there ∂gain is computed from z."""


def scale_and_shift_(y: Tensor, gain: Tensor | None, shift: Tensor | None) -> None:
    """y ⊙ (1 + gain) + shift in place, for y (T, out); computed in the wider of the precisions."""
    alike = gain is not None and shift is not None and y.dtype == gain.dtype == shift.dtype
    if alike and readable():  # a compiler makes one pass of two; tracers know no `out=`
        assert gain is not None
        assert shift is not None
        torch.addcmul(shift, y, 1 + gain, out=y)
        return
    if gain is not None:
        y.mul_(1 + gain)
    if shift is not None:
        y.add_(shift)


def gain_from_output(total: Tensor, gain: Tensor, g: Tensor, z: Callable[[Tensor], Tensor]) -> Tensor:
    """∂gain (out,) = total / c, from `total` = c ∂gain as y gave it; where c is small, Σ_t g ⊙ z from z itself.

    z: columns (n,) of x Wᵀ -> their values (T, n).
    """
    c = 1 + gain
    if c.numel() and float(c.abs().min()) >= SMALL_C:
        return total / c
    small = c.abs() < SMALL_C
    dgain = total / torch.where(small, 1.0, c)
    few = small.nonzero().squeeze(1)
    dgain[few] = column_dots(g[:, few], z(few)).to(dgain.dtype)
    return dgain


def column_dots(g: Tensor, y: Tensor) -> Tensor:
    """Σ_t g ⊙ y, (T, out) -> (out,), summed in at least 32 bit.

    As many rows as stay in a CPU's cache are summed beside each other: each product is made where its sum lies.
    """
    wide = torch.promote_types(g.dtype, torch.float32)
    if g.device.type != "cpu" or torch.compiler.is_compiling():
        return (g * y).sum(0, dtype=wide)
    step = max(1, BESIDE // max(1, g.shape[1]))
    sums = g[:step].to(wide) * y[:step]
    for start in range(step, len(g), step):
        part = slice(start, start + step)
        sums[: len(g) - start].addcmul_(g[part], y[part])
    return sums.sum(0)


def alias(y: Tensor) -> tuple[Tensor, Any]:
    """`y` for `save_for_backward`, and a function that says whether y has not been written to since.

    Saving y itself would make `relu_(y)` an error, which it is not after a plain linear layer; here it only costs a
    product in backward. The witness shares y's version counter, not its memory; a write that PyTorch does not count
    (through `.data` or NumPy) it does not see.
    """
    witness = y.detach()
    witness.data = torch.empty(0, dtype=y.dtype, device=y.device)
    version = witness._version
    return y.data, lambda: witness._version == version
