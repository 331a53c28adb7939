"""Thin products where the channels stand before the places, (N, channels, *places): a convolution's low-rank change.

    h = A(in(x))      (N, r, *places)
    y += s B h        in every place

A convolves as the layer does; B, and A where its kernel is a single point, are one product per sample. torch's 1x1
convolution brings every sample into another order of memory and back, which for so few channels takes several times as
long as the product. The derivatives are those of torch's operations, as often as wished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.ops.matmul import adds_in_place, transformed
from deltaw.ops.select import is_small_kernel
from deltaw.ops.terms import Factors, moved

FEW = 16
"""Places of a sample below which one convolution for all samples is faster than a product for each."""


MANY = 64
"""Places from which even a product with a whole weight is the faster one."""


def multiplies(x: Tensor, weight: Tensor, adapters: Sequence[Factors]) -> bool:
    """Whether the product with a pointwise convolution's weight, W or W + ΔW, is one per sample too.

    Not while the adapters are at their start: it rounds otherwise than the convolution, and a fresh adapter changes no bit.
    """
    return (
        math.prod(x.shape[2:]) >= MANY
        and adds_in_place(x, weight)
        and x.is_contiguous()
        and not transformed()
        and (not weight.requires_grad or is_small_kernel(weight.numel()))  # its gradient is one per sample at first
        and moved(adapters)
    )


def product_by_places(M: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """M x + bias in every place: (r, in), (N, in, *places) and (r,) -> (N, r, *places)."""
    each, rows = M.expand(len(x), *M.shape), x.flatten(2)
    h = torch.bmm(each, rows) if bias is None else torch.baddbmm(bias[:, None], each, rows)
    return torch.ops.aten._unsafe_view.default(h, (*h.shape[:2], *x.shape[2:]))  # type: ignore[no-any-return]


def plus_product_by_places(y: Tensor, h: Tensor, B: Tensor, scale: float, *, fresh: bool) -> Tensor:
    """y + scale B h in every place: y (N, out, *places), h (N, r, *places) and B (out, r) -> as y, in y's dtype.

    fresh: nobody keeps y, so that the sum is formed in its memory. With B = 0 the result is y to the bit.
    """
    flat = (*y.shape[:2], math.prod(y.shape[2:]))
    h, B = h.to(y.dtype).flatten(2), B.to(y.dtype).expand(len(y), *B.shape)
    if fresh and not torch.compiler.is_compiling() and not transformed():
        # no view to autograd, which would copy every gradient that passes through one
        rows = torch.ops.aten._unsafe_view.default(y, flat).baddbmm_(B, h, alpha=scale)
        return torch.ops.aten._unsafe_view.default(rows, y.shape)  # type: ignore[no-any-return]
    return torch.baddbmm(y.reshape(flat), B, h, alpha=scale).view(y.shape)
