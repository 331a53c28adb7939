"""What one adapter does inside the fused operation (linear.py, grouped.py): its thin products, and their derivatives.

In the terms of linear.py's header, with in(·) the dropout on A's input and out(·) the dropout on the change, of which an
adapter has at most one:

    project                 h = in(x) Aᵀ
    change, first_change    s out(h Bᵀ), for y;   or that first, and the base product added to it
    backward_factors        u = out(g) B,  ∂A = s uᵀ in(x),  ∂B = s out(g)ᵀ h
    input_gradient, first_input_gradient
                            s in(u A), for ∂x;    or that first
    finish_                 all changes into y or ∂x, with whatever else is to be done to it

They are made of four operations over rows, which run as one sweep where they are compiled (cpu_thin.py), else as torch's own
(`Plain`, the twin).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.compiled import addressable
from deltaw.ops.cpu_thin import Made, Sweep, takes
from deltaw.ops.dropout import Mask
from deltaw.ops.gain import column_dots, scale_and_shift_
from deltaw.ops.matmul import adds_in_place, by_onednn, joined, linear, thin
from deltaw.ops.select import is_narrow
from deltaw.ops.terms import FrozenProduct, Term, blocks, flat, moved

ALL = slice(None)


class Plain:
    """The plain twin of `cpu_thin.Sweep`: each operation in torch's own, at once."""

    def shrink(self, x: Tensor, A: Tensor, mask: Mask | None = None) -> Tensor:
        """drop(x) Aᵀ, (T, r), of x (T, k) and A (r, k)."""
        A = A.to(x.dtype)
        if mask is None:
            return thin(x, A)
        return joined([thin(x[part] * mask.rows(part), A) for part in blocks(x)])

    def expand_(self, y: Tensor, h: Tensor, Bt: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
        """y += scale drop(h Bᵀ) in place, of y (T, n), h (T, r) and Bᵀ (r, n)."""
        Bt = Bt.to(y.dtype)
        if mask is None:
            return y.addmm_(h, Bt, alpha=scale)
        for part in blocks(y):
            y[part].addcmul_(linear(h[part], Bt.t()), mask.rows(part), value=scale)
        return y

    def outer(
        self, u: Tensor, x: Tensor, scale: float, mask: Mask | None = None, *, transposed: bool = False
    ) -> Tensor:
        """scale uᵀ drop(x), (r, k) or transposed (k, r), of u (T, r) and x (T, k)."""
        u = u.to(x.dtype)
        if mask is None:
            out = linear(u.t(), x.t())
        else:
            out = sum(linear(u[part].t(), (x[part] * mask.rows(part)).t()) for part in blocks(x))  # type: ignore[assignment]
        return (out.t().contiguous() if transposed else out).mul_(scale)

    def dots(self, x: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        """Σ_t x ⊙ (y - b), (k,), of x and y (T, k) and b (k,)."""
        total = column_dots(x, y)
        return total if b is None else total - b * x.sum(0)

    def run(self) -> None:
        """Nothing is left to do."""


def sweep_over(terms: Sequence[Term], *rows: Tensor | Made | None) -> Sweep | Plain:
    """What runs the operations of these terms over all these rows, each (T, any)."""
    if not terms:
        return Plain()
    compiled = takes(*rows, factors=[z for t in terms for z in (t.A, t.B)]) and all(
        t.seed is not None or is_narrow(t.A.shape[0], shared=len(rows) > 1) for t in terms
    )
    return Sweep() if compiled else Plain()


def project(sweep: Sweep | Plain, t: Term, x: Tensor) -> Tensor:
    """h = in(x) Aᵀ, (T, r), of x (T, in); there when `sweep` has run."""
    return sweep.shrink(x, t.A, t.input_mask(x))


def base_values(
    rows: Tensor | Callable[[], Any], weight: Tensor | None, frozen: FrozenProduct | None, columns: Tensor | slice = ALL
) -> Tensor:
    """Those columns of z = x Wᵀ, (T, n), for x (T, in), or what gives x, and a W that is dense or held by `frozen`. Not
    differentiable."""
    rows = rows if isinstance(rows, Tensor) else flat(rows())
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


def first_change(sweep: Sweep | Plain, h: Tensor, t: Term, bias: Tensor | None) -> Tensor:
    """s h Bᵀ + b, (T, out), written once, when `sweep` has run."""
    B = t.B.to(h.dtype).t()
    if (bias is None or addressable(bias)) if isinstance(sweep, Sweep) else takes(h, factors=(B, bias)):
        return laid(sweep, h, B, t.scale, shift=bias)
    sweep.run()
    B = B * t.scale
    if bias is None:
        return h @ B
    ones = F.pad(h, (0, 1), value=1.0)  # b is one more column of s B, beside one of ones in h
    return ones @ torch.cat([B, bias[None]])


def laid(
    sweep: Sweep | Plain, h: Tensor, Bt: Tensor, scale: float, mask: Mask | None = None, shift: Tensor | None = None
) -> Tensor:
    """scale · drop(h Bt) + shift, (T, n), as the last of `sweep`, or in one of its own."""
    y = h.new_empty(h.shape[0], Bt.shape[1])
    own = sweep if isinstance(sweep, Sweep) else Sweep()
    own.expand_(y, h, Bt, scale, mask, shift=shift, first=True)
    if own is not sweep:
        own.run()
    return y


class Change(NamedTuple):
    """scale · drop(h Bt), (T, n): what one adapter adds. h (T, r), Bt (r, n)."""

    h: Tensor
    Bt: Tensor
    scale: float
    mask: Mask | None


def change(h: Tensor, t: Term) -> Change:
    """s out(h Bᵀ), which is added to y (T, out)."""
    return Change(h, t.B.t(), t.scale, t.output_mask(h))


def input_gradient(u: Tensor, t: Term) -> Change:
    """s in(u A), which is added to ∂x (T, in)."""
    return Change(u, t.A, t.scale, t.input_mask(u))


def finish_(
    y: Tensor, scales: Tensor | None, gain: Tensor | None, shift: Tensor | None, changes: Sequence[Change]
) -> None:
    """y ← scales ⊙ (1 + gain) ⊙ y + shift + Σ changes in place, of y (T, n), scales (T, 1), gain and shift (n,).

    Compiled where there are scales or dropout; else torch's own operations are as fast.
    """
    factors = [gain, shift, *(z for c in changes for z in (c.h, c.Bt))]
    if (scales is None and all(c.mask is None for c in changes)) or not takes(y, factors=factors):
        if scales is not None:
            y.mul_(scales)
        scale_and_shift_(y, gain, shift)
        for c in changes:
            Plain().expand_(y, *c)
        return
    sweep = Sweep()
    if not changes:
        changes = [Change(y[:, :0], y[:0], 1.0, None)]
    first, *others = changes
    sweep.expand_(y, *first, rowscale=scales, gain=None if gain is None else 1 + gain, shift=shift)
    for c in others:
        sweep.expand_(y, *c)
    sweep.run()


def backward_factors(
    sweep: Sweep | Plain,
    t: Term,
    g: Tensor,
    x: Any,
    h: Tensor | None,
    needs_A: bool,
    needs_B: bool,
    needs_u: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂A, ∂B and u = out(g) B, (T, r), of one term from g (T, out) and x (T, in), or the sweep's tiles of x; None for what is
    not needed. They hold it when `sweep` has run."""
    mask, drop = t.input_mask(x), t.output_mask(g)
    dA = dB = u = None
    if needs_A or needs_u:
        u = sweep.shrink(g, t.B.t(), drop)
    if needs_B:
        h = sweep.shrink(x, t.A, mask) if h is None else h.to(x.dtype)
        dB = sweep.outer(h, g, t.scale, drop, transposed=True).to(t.B.dtype)
    if needs_A:
        assert u is not None
        dA = sweep.outer(u, x, t.scale, mask).to(t.A.dtype)
    return dA, dB, u


def first_input_gradient(sweep: Sweep | Plain, u: Tensor, t: Term) -> Tensor:
    """s in(u A), (T, in), for u (T, r), when `sweep` has run."""
    A, mask = t.A.to(u.dtype), t.input_mask(u)
    if isinstance(sweep, Sweep) or takes(u, factors=(A,)):
        return laid(sweep, u, A, t.scale, mask)
    dx = u @ (A * t.scale)
    if mask is not None:
        for part in blocks(dx):
            dx[part].mul_(mask.rows(part))
    return dx
