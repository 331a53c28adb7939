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
from torch.nn import functional as F

from deltaw.ops.matmul import adds_in_place, transformed
from deltaw.ops.terms import Factors, moved

FEW = 8
"""Places of a sample below which one convolution for all samples is faster than a product for each."""

MANY = 64
"""Places from which even a product with a whole weight is the faster one."""


def is_product(places: int) -> bool:
    """Whether thin products are one per sample; of samples of one place, one for all of them. Left to a compiler, to which
    a number of places may be a symbol, they are convolutions."""
    return not torch.compiler.is_compiling() and (places == 1 or places >= FEW)


def multiplies(x: Tensor, weight: Tensor, adapters: Sequence[Factors]) -> bool:
    """Whether the product with a pointwise convolution's weight, W or W + ΔW, is one per sample too.

    Not while the adapters are at their start: it rounds otherwise than the convolution, and a fresh adapter changes no bit.
    Nor where W's gradient, one per sample at first, would have more numbers than x and y.
    """
    places = math.prod(x.shape[2:])
    return (
        adds_in_place(x, weight)
        and places >= MANY
        and x.is_contiguous()
        and not transformed()
        and (not weight.requires_grad or weight.numel() <= places * sum(weight.shape[:2]))
        and moved(adapters)
    )


def product_by_places(M: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """M x + bias in every place: (r, in), (N, in, *places) and (r,) -> (N, r, *places)."""
    count, places = x.shape[0], x.shape[2:]
    if math.prod(places) == 1:
        return F.linear(x.flatten(1), M, bias).view(count, M.shape[0], *places)
    each, rows = M.expand(count, *M.shape), x.flatten(2)
    h = torch.bmm(each, rows) if bias is None else torch.baddbmm(bias[:, None], each, rows)
    return torch.ops.aten._unsafe_view.default(h, (count, M.shape[0], *places))  # type: ignore[no-any-return]


def plus_product_by_places(y: Tensor, h: Tensor, B: Tensor, scale: float, *, fresh: bool) -> Tensor:
    """y + scale B h in every place: y (N, out, *places), h (N, r, *places) and B (out, r) -> as y, in y's dtype.

    fresh: nobody keeps y, so that the sum is formed in its memory. With B = 0 the result is y to the bit.
    """
    alone = math.prod(y.shape[2:]) == 1
    h, B = h.to(y.dtype).flatten(1 if alone else 2), B.to(y.dtype)
    factors = (h, B.t()) if alone else (B.expand(y.shape[0], *B.shape), h)
    flat = (*y.shape[:2], *h.shape[2:])
    if not fresh or transformed():
        plus = torch.addmm if alone else torch.baddbmm
        return plus(y.reshape(flat), *factors, alpha=scale).view(y.shape)
    # In place, which keeps B and h but not y; and no view to autograd, which would copy every gradient that passes through one
    rows = torch.ops.aten._unsafe_view.default(y, flat)
    rows = rows.addmm_(*factors, alpha=scale) if alone else rows.baddbmm_(*factors, alpha=scale)
    return torch.ops.aten._unsafe_view.default(rows, y.shape)  # type: ignore[no-any-return]
