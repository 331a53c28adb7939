"""What one adapter does inside the fused operation (linear.py, grouped.py): its thin products, and their derivatives.

In the terms of linear.py's header, with in(·) the dropout on A's input and out(·) the dropout on the change, of which an
adapter has at most one:

    project                 h = in(x) Aᵀ
    add_, first_change      y += s out(h Bᵀ);  or that first, and the base product added to it
    backward_factors        u = out(g) B,  ∂A = s uᵀ in(x),  ∂B = s out(g)ᵀ h
    add_input_gradient_, first_input_gradient
                            ∂x += s in(u A);   or that first

All of it is `times`, `plus_` and `outer`, on the compiled operations (cpu_thin.py) or on torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops import cpu_thin
from deltaw.ops.dropout import Mask
from deltaw.ops.matmul import adds_in_place, by_onednn, joined, linear, thin
from deltaw.ops.select import is_narrow
from deltaw.ops.terms import FrozenProduct, Term, blocks, flat, moved

ALL = slice(None)


def times(x: Tensor, A: Tensor, mask: Mask | None = None) -> Tensor:
    """drop(x) Aᵀ, (T, r), of x (T, k) and A (r, k)."""
    A = A.to(x.dtype)
    if cpu_thin.takes(x, A) and (mask is not None or is_narrow(A.shape[0])):
        return cpu_thin.shrink(x, A, mask)
    if mask is None:
        return thin(x, A)
    return joined([thin(x[part] * mask.rows(part), A) for part in blocks(x)])


def plus_(y: Tensor, h: Tensor, B: Tensor, scale: float, mask: Mask | None = None) -> None:
    """y += scale drop(h Bᵀ) in place, of y (T, n), h (T, r) and B (n, r)."""
    B = B.to(y.dtype)
    if mask is None:
        y.addmm_(h, B.t(), alpha=scale)
    elif cpu_thin.takes(y, h, B):
        cpu_thin.expand_(y, h, B.t(), scale, mask=mask)
    else:
        for part in blocks(y):
            y[part].addcmul_(linear(h[part], B), mask.rows(part), value=scale)


def outer(u: Tensor, x: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """scale uᵀ drop(x), (r, k), of u (T, r) and x (T, k)."""
    if mask is None:
        return linear(u.t(), x.t()).mul_(scale)
    if cpu_thin.takes(x, u):
        return cpu_thin.outer(u, x, scale, mask)
    return scale * sum(linear(u[part].t(), (x[part] * mask.rows(part)).t()) for part in blocks(x))


def project(t: Term, x: Tensor) -> Tensor:
    """h = in(x) Aᵀ, (T, r), of x (T, in)."""
    return times(x, t.A, t.input_mask(x))


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
    """s h Bᵀ + b, (T, out), written once; without a compiled operation b is one more column of s B, beside one more
    column of h, of ones."""
    B = t.B.to(h.dtype).t()
    if cpu_thin.takes(h, B, *(() if bias is None else (bias,))):
        return cpu_thin.expand_(h.new_empty(h.shape[0], B.shape[1]), h, B, t.scale, shift=bias, first=True)
    B = B * t.scale
    if bias is None:
        return h @ B
    return F.pad(h, (0, 1), value=1.0) @ torch.cat([B, bias[None]])


def add_(y: Tensor, h: Tensor, t: Term) -> None:
    """y += s out(h Bᵀ) in place, for h (T, r) and y (T, out)."""
    plus_(y, h, t.B, t.scale, t.output_mask(y))


def backward_factors(
    t: Term, g: Tensor, x: Tensor, h: Tensor | None, needs_A: bool, needs_B: bool, needs_u: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂A, ∂B and u = out(g) B, (T, r), of one term from g (T, out) and x (T, in); None for what is not needed."""
    drop = t.output_mask(g)
    dA = dB = u = None
    if needs_B:
        h = project(t, x) if h is None else h.to(x.dtype)
        dB = outer(h, g, t.scale, drop).t().to(t.B.dtype).contiguous()
    if needs_A or needs_u:
        u = times(g, t.B.t(), drop)
    if needs_A:
        assert u is not None
        dA = outer(u, x, t.scale, t.input_mask(x)).to(t.A.dtype)
    return dA, dB, u


def add_input_gradient_(dx: Tensor, u: Tensor, t: Term) -> None:
    """dx += s in(u A) in place, for u (T, r) and dx (T, in)."""
    plus_(dx, u, t.A.t(), t.scale, t.input_mask(dx))


def first_input_gradient(u: Tensor, t: Term) -> Tensor:
    """s in(u A), (T, in), for u (T, r)."""
    A = t.A.to(u.dtype)
    if cpu_thin.takes(u, A):
        dx = u.new_empty(u.shape[0], A.shape[1])
        return cpu_thin.expand_(dx, u, A, t.scale, mask=t.input_mask(dx), first=True)
    dx = u @ (A * t.scale)
    mask = t.input_mask(dx)
    if mask is not None:
        for part in blocks(dx):
            dx[part].mul_(mask.rows(part))
    return dx
