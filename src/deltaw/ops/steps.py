"""What one adapter does inside the fused operation (linear.py, grouped.py): its thin products, and their derivatives.

In the terms of linear.py's header, with in(·) the dropout on A's input and out(·) the dropout on the change, of which an
adapter has at most one:

    project                 h = in(x) Aᵀ
    add_, first_change      y += s out(h Bᵀ);  or that first, and the base product added to it
    backward_factors        u = out(g) B,  ∂A = s uᵀ in(x),  ∂B = s out(g)ᵀ h
    add_input_gradient_, first_input_gradient
                            ∂x += s in(u A);   or that first
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.matmul import adds_in_place, by_onednn, joined, linear, thin
from deltaw.ops.terms import FrozenProduct, Term, blocks, flat, moved

ALL = slice(None)


def project(t: Term, x: Tensor) -> Tensor:
    """h = in(x) Aᵀ, (T, r), of x (T, in)."""
    A = t.A.to(x.dtype)
    mask = t.input_mask(x)
    if mask is None:
        return thin(x, A)
    return joined([thin(x[part] * mask.rows(part), A) for part in blocks(x)])


def base_values(
    rows: Tensor, weight: Tensor | None, frozen: FrozenProduct | None, columns: Tensor | slice = ALL
) -> Tensor:
    """Those columns of z = x Wᵀ, (T, n), for x (T, in) and a W that is dense or held by `frozen`. Not differentiable."""
    if weight is not None:
        return linear(rows, weight[columns])
    assert frozen is not None
    return frozen.matmul(rows)[:, columns]


def first_product(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """x Wᵀ + b, (..., in) -> (..., out). While all terms are zero it is `F.linear`'s to the bit: a fresh adapter changes
    nothing, whichever library is the faster one (matmul.py)."""
    rows = flat(x)
    if by_onednn(rows, weight) and moved(terms):
        return linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def is_laid_first(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> bool:
    """Whether `first_change` goes first and the base's product is added to it.

    A fresh change lays b where F.linear lays it, and then the sums are F.linear's to the bit; without b, or where
    F.linear adds it last (x not contiguous), they may not be: there only when some term has moved.
    """
    return (
        adds_in_place(x, weight)
        and all(t.seed is None or not t.at_output for t in terms)
        and ((bias is not None and bias.dtype == x.dtype and x.is_contiguous() and x.dim() > 1) or moved(terms))
    )


def first_change(h: Tensor, t: Term, bias: Tensor | None) -> Tensor:
    """s h Bᵀ + b, (T, out), written once: b is one more column of s B, beside one more column of h, of ones."""
    B = t.B.to(h.dtype).t() * t.scale
    if bias is None:
        return h @ B
    return F.pad(h, (0, 1), value=1.0) @ torch.cat([B, bias[None]])


def add_(y: Tensor, h: Tensor, t: Term) -> None:
    """y += s out(h Bᵀ) in place, for h (T, r) and y (T, out)."""
    B = t.B.to(y.dtype).t()
    drop = t.output_mask(y)
    if drop is None:
        y.addmm_(h, B, alpha=t.scale)
    else:
        y.addcmul_(h @ B, drop, value=t.scale)


def backward_factors(
    t: Term, g: Tensor, x: Tensor, h: Tensor | None, needs_A: bool, needs_B: bool, needs_u: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂A, ∂B and u = out(g) B, (T, r), of one term from g (T, out) and x (T, in); None for what is not needed."""
    drop = t.output_mask(g)
    if drop is not None:
        g = g * drop
    dA = dB = u = None
    if needs_B:
        h = project(t, x) if h is None else h.to(x.dtype)
        dB = linear(h.t(), g.t()).t().to(t.B.dtype).contiguous().mul_(t.scale)
    if needs_A or needs_u:
        u = thin(g, t.B.to(x.dtype).t())
    if needs_A:
        assert u is not None
        mask = t.input_mask(x)
        if mask is None:
            dA = linear(u.t(), x.t())
        else:
            dA = u.new_zeros(t.A.shape)
            for part in blocks(x):
                dA += linear(u[part].t(), (x[part] * mask.rows(part)).t())
        dA = dA.to(t.A.dtype).mul_(t.scale)
    return dA, dB, u


def add_input_gradient_(dx: Tensor, u: Tensor, t: Term) -> None:
    """dx += s in(u A) in place, for u (T, r) and dx (T, in)."""
    A = t.A.to(dx.dtype)
    mask = t.input_mask(dx)
    if mask is None:
        dx.addmm_(u, A, alpha=t.scale)
        return
    for part in blocks(dx):
        dx[part].addcmul_(linear(u[part], A.t()), mask.rows(part), value=t.scale)


def first_input_gradient(u: Tensor, t: Term) -> Tensor:
    """s in(u A), (T, in), for u (T, r)."""
    dx = u @ (t.A.to(u.dtype) * t.scale)
    mask = t.input_mask(dx)
    if mask is not None:
        for part in blocks(dx):
            dx[part].mul_(mask.rows(part))
    return dx
