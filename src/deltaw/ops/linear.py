"""The fused adapted linear: base product, bias, adapters, dropout and their backward as one operation.

    z = x Wᵀ      h = in(x) Aᵀ      y = z + b + Σ ( gain ⊙ z + s out(h Bᵀ) )

with x (T, in), W (out, in) and, of each adapter, A (r, in), B (out, r), gain (out,) and a scale s. in(·) and out(·) are
its dropout, on A's input or on the change; each multiplies by a mask, and one of them at least is the identity. Let
g = ∂L/∂y, c = 1 + Σ gain and, per adapter, u = out(g) B, (T, r). Then

    ∂x = (g ⊙ c) W + Σ s in(u A)      one buffer; the adapters are added to it in place
    ∂A = s uᵀ in(x)                   ∂B = s out(g)ᵀ h
    ∂gain = Σ_t g ⊙ z                 and since c z = y - b - Σ s out(h Bᵀ), it is read from y instead of z:
    c ∂gain = Σ_t g ⊙ y - b ⊙ Σ_t g - Σ Σ_r B ⊙ ∂B

y is most often kept already, by the operation that reads it; z is not (in 16 bit y is rounded at the size of b, so that
with a bias z is computed again).

Where W' = c W + Σ s B A is cheaper to form than the adapters are to apply (select.py), the base product runs on W' and
the adapters cost nothing in y and in ∂x; W' is formed again in backward, not kept. Otherwise, and for adapters with
dropout, they are added to the base's output by `addmm_`: no scale pass, no add pass, no copy. Where a product can be
added in place at no cost (`matmul.adds_in_place`), the adapter's change is written first and the base product is
accumulated onto it, which is one pass over y less.

x is saved as it came, so that all projections of one input keep one copy, or not at all where it can be made again from
what its producer keeps (recompute.py). Dropout is made again from its seed. Nothing is computed for an input that needs
no gradient. What one adapter does is in steps.py; the plain twin is `adapted_linear_reference`.

Where the products are so small that all this bookkeeping costs more than they do (select.py), torch's own operations are
composed instead (composed.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.compact import as_saved, is_kept_wide
from deltaw.ops.composed import composed
from deltaw.ops.cpu_thin import Sweep
from deltaw.ops.gain import alias, column_dots, gain_from_output
from deltaw.ops.leaves import as_views
from deltaw.ops.matmul import adds_in_place, linear, transformed
from deltaw.ops.recompute import Recipe, recipe_of
from deltaw.ops.select import is_small, use_merged
from deltaw.ops.steps import (
    Plain,
    backward_factors,
    base_values,
    change,
    finish_,
    first_change,
    first_input_gradient,
    first_product,
    input_gradient,
    is_laid_first,
    project,
    sweep_over,
)
from deltaw.ops.terms import (
    TENSORS,
    Factors,
    FrozenProduct,
    Plan,
    Term,
    by_rows,
    flat,
    in_force,
    merged_weight,
    pack,
    total_gain,
    unpack,
)
from deltaw.ops.twice import apart, twice


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Sequence[Factors],
    *,
    training: bool,
    frozen: FrozenProduct | None = None,
) -> Tensor:
    """x Wᵀ + b + the changes of all `adapters`, (..., in) -> (..., out), in x's dtype.

    weight: W (out, in), dense; or None where `frozen` holds it. bias: (out,) or None. All may require a gradient.
    training: whether the adapters' dropout is in force.

    Adapters kept in another precision than x are rounded to x's for the products; their gradients come back in theirs.
    With B = 0 and gain = 0 the result equals `F.linear(x, weight, bias)` to the bit.
    Differentiable as often as wished (twice.py), but where only B learns.
    """
    if not adapters and weight is not None:
        return F.linear(x, weight, bias)
    if x.is_nested and x.layout == torch.jagged:  # sequences of different lengths, their rows one after the other
        rows = adapted_linear(x.values(), weight, bias, adapters, training=training, frozen=frozen)
        return torch.nested.nested_tensor_from_jagged(rows, x.offsets(), x.lengths())  # type: ignore[attr-defined]
    x, weight, bias = as_autocast(x, weight, bias)
    tokens, compiled = math.prod(x.shape[:-1]), torch.compiler.is_compiling()
    if weight is not None and not compiled and is_small(weight.shape[0], weight.shape[1], tokens):
        return composed(x, weight, bias, [in_force(a, training, False, x.device) for a in adapters])
    gains = any(a.gain is not None for a in adapters)
    merge = weight is not None and use_merged(weight.shape[0], weight.shape[1], tokens, x.dtype, gains, x.device.type)
    terms = [in_force(a, training, merge, x.device) for a in adapters]
    if transformed():
        return plain(x, weight, bias, terms, frozen)
    if not torch.is_grad_enabled() and not compiled:
        return adapted_values(x, weight, bias, terms, merge, frozen, True)[0]
    plan, tensors = pack(terms)
    keep = reads_x(weight, terms)
    recipe, sources = (recipe_of(x) if keep else None) or (None, ())
    parameters = as_views((weight, bias, *tensors))
    call = Call(plan, merge, frozen, keep, recipe)
    y: Tensor = AdaptedLinear.apply(call, sources, x, *parameters)  # type: ignore[no-untyped-call]
    return y


def reads_x(weight: Tensor | None, terms: Sequence[Term]) -> bool:
    """Whether backward reads x itself. Where only B learns (LoRA-FA) it reads h = drop(x) Aᵀ, which is kept instead."""
    return (weight is not None and weight.requires_grad) or any(
        t.A.requires_grad or (t.gain is not None and t.gain.requires_grad) for t in terms
    )


def adapted_linear_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Sequence[Factors],
    *,
    training: bool,
    frozen: FrozenProduct | None = None,
) -> Tensor:
    """The same function in plain PyTorch; with the same generator state, the same dropout."""
    x, weight, bias = as_autocast(x, weight, bias)
    return plain(x, weight, bias, [in_force(a, training, False, x.device) for a in adapters], frozen)


def plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: Sequence[Term], frozen: FrozenProduct | None
) -> Tensor:
    """The formula of the header, term by term."""
    if weight is None:
        base: Tensor = FrozenMatmul.apply(frozen, x)  # type: ignore[no-untyped-call]
    else:
        base = F.linear(x, weight)
    y = base if bias is None else base + bias
    for t in terms:
        inputs, A, B = x, t.A.to(x.dtype), t.B.to(x.dtype)
        mask = t.input_mask(flat(x))
        if mask is not None:
            inputs = x * mask.rows(slice(None)).view(x.shape)
        change = t.scale * F.linear(F.linear(inputs, A), B)
        drop = t.output_mask(flat(change))
        if drop is not None:
            change = change * drop.rows(slice(None)).view(change.shape)
        if t.gain is not None:
            change = change + t.gain * base
        y = y + change.to(y.dtype)
    return y


class FrozenMatmul(torch.autograd.Function):
    """x Wᵀ, or g W (`transposed`), for a W that only knows its two products: each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, frozen: FrozenProduct, x: Tensor, transposed: bool = False) -> Tensor:
        """(..., in) -> (..., out); transposed (..., out) -> (..., in)."""
        ctx.frozen, ctx.transposed = frozen, transposed
        return frozen.matmul_grad(x) if transposed else frozen.matmul(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The other product."""
        needed = ctx.needs_input_grad[1]
        return None, FrozenMatmul.apply(ctx.frozen, grads[0], not ctx.transposed) if needed else None, None  # type: ignore[no-untyped-call]


class Call(NamedTuple):
    """What is fixed in one call of the operation, beside its tensors.

    plan: the constants of the packed terms. merge: gains and undropped factors are in W'. frozen: W, where it is no tensor.
    keep: backward reads x, which `recipe`, if there is one, makes again.
    """

    plan: Plan
    merge: bool = False
    frozen: FrozenProduct | None = None
    keep: bool = True
    recipe: Recipe | None = None


def kept_of(ctx: Any, saved: Sequence[Any]) -> tuple[Any, Any, Any, Any, list[Any], list[Any]]:
    """y, x, W, b, the packed terms before their h, and what x is to be made again from, of what `AdaptedLinear` saved."""
    kept, x, weight, bias, *rest = saved
    at = len(rest) - ctx.sources
    return kept, x, weight, bias, rest[:at], rest[at:]


def sweep_and_rows(
    call: Call, x: Tensor | None, sources: Sequence[Tensor], whole: bool, terms: Sequence[Term], *read: Tensor | None
) -> tuple[Sweep | Plain, Any]:
    """What runs over the rows of `read` and of x, and x for it, (T, in): as tiles, where it is made again for nobody else (not
    `whole`). None where backward does not read it."""
    recipe = call.recipe
    made = None if recipe is None or whole else recipe.tiles(sources)
    if recipe is not None and made is not None:
        sweep = sweep_over(terms, made, *read)
        if isinstance(sweep, Sweep):
            recipe.pass_by()
            return sweep, sweep.make(made)
    again = x_again(call, x, sources)
    rows = None if again is None else flat(again)
    return sweep_over(terms, rows, *read), rows


def x_again(call: Call, x: Tensor | None, sources: Sequence[Tensor]) -> Any:
    """x, or None where it was not kept."""
    return x if call.recipe is None else call.recipe.take(sources)


def plain_again(ctx: Any, saved: Sequence[Any]) -> tuple[Tensor, list[Any]] | None:
    """The plain twin of a call, for twice.py; None where x was not kept."""
    call: Call = ctx.call
    if not call.keep:
        return None
    _, x, weight, bias, rest, sources = kept_of(ctx, saved)
    x = x_again(call, x, sources)
    x, weight, bias, *tensors = apart([x, weight, bias, *rest[: TENSORS * len(call.plan)]])
    y = plain(x, weight, bias, unpack(call.plan, tensors), call.frozen)
    return y, [None, None, x, weight, bias, *tensors]


class AdaptedLinear(torch.autograd.Function):
    """The operation and its hand-written derivative; see the header of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        sources: tuple[Tensor, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """`sources`: what `call.recipe` makes x again from. `tensors`: the packed terms."""
        terms = unpack(call.plan, tensors)
        y, products = adapted_values(x, weight, bias, terms, call.merge, call.frozen, call.keep)
        products = [None if h is None else as_saved(h) for h in products]
        kept = None  # y, from which ∂gain is read
        learns_gain = any(t.gain is not None and t.gain.requires_grad for t in terms)
        if learns_gain and not torch.compiler.is_compiling() and (bias is None or is_kept_wide(y)):
            kept, ctx.witness = alias(y)
        ctx.call, ctx.sources, ctx.columns = call, len(sources), x.shape[-1]
        saved = x if call.keep and call.recipe is None else None
        ctx.save_for_backward(kept, saved, weight, bias, *tensors, *products, *sources)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @twice(plain_again)
    def backward(ctx: Any, saved: Sequence[Any], *grads: Tensor) -> tuple[Any, ...]:
        """The derivatives of the header; None for every input that needs none."""
        kept, x, weight, bias, rest, sources = kept_of(ctx, saved)
        call: Call = ctx.call
        terms = unpack(call.plan, rest)
        products = rest[TENSORS * len(terms) :]
        needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad[2:]
        needs_gain = any(needs[i] for i in range(2, len(needs), TENSORS))
        g = flat(grads[0]).contiguous()  # (T, out)
        gain = total_gain(terms)
        from_y = needs_gain and kept is not None and ctx.witness()
        scaled = g
        if gain is not None and (needs_weight or (needs_x and not call.merge)):
            scaled = (g * (1 + gain)).to(g.dtype)

        dfactors: list[Tensor | None] = []
        projected: list[Tensor | None] = []  # g B of each term
        read = (flat(kept), bias) if from_y else ()
        whole = needs_weight or (needs_gain and not from_y)
        sweep, rows = sweep_and_rows(call, x, sources, whole, terms, g, *read)
        if rows is None:
            rows = g.new_empty(()).expand(g.shape[0], ctx.columns)  # the shape of x alone
        for i, (t, h) in enumerate(zip(terms, products, strict=True)):
            needs_A, needs_B = needs[TENSORS * i], needs[TENSORS * i + 1] or from_y
            dA, dB, u = backward_factors(sweep, t, g, rows, h, needs_A, needs_B, needs_x and not t.merged)
            dfactors += [dA, dB]
            projected.append(u)
        total = sweep.dots(g, flat(kept), bias) if from_y else None
        added = [(u, t) for u, t in zip(projected, terms, strict=True) if u is not None and not t.merged]
        first = laid = None  # one adapter's share of ∂x, onto which the base's is added
        if needs_x and added and weight is not None and adds_in_place(g, weight):
            first = added.pop(0)  # torch's own operations lay it when x has been let go
            laid = first_input_gradient(sweep, *first) if isinstance(sweep, Sweep) else None
        sweep.run()
        dgain = None
        if total is not None:
            assert gain is not None
            for t, dB in zip(terms, dfactors[1::2], strict=True):
                assert dB is not None
                total -= (t.B * dB).sum(1)
            rows = rows if isinstance(rows, Tensor) else functools.partial(x_again, call, x, sources)
            dgain = gain_from_output(total, gain, g, functools.partial(base_values, rows, weight, call.frozen))
        elif needs_gain:
            dgain = column_dots(g, base_values(rows, weight, call.frozen))
        dterms: list[Tensor | None] = []
        for i, t in enumerate(terms):
            wanted = needs[TENSORS * i + 2]
            dterms += dfactors[2 * i : 2 * i + 2]
            dterms += [dgain.to(t.gain.dtype) if wanted and dgain is not None and t.gain is not None else None, None]
        dweight = linear(scaled.t(), rows.t()) if needs_weight else None
        del x, rows  # before ∂x, which is as large, is made
        dx: Tensor | None = None
        if needs_x:
            scales = None
            if weight is None:
                assert call.frozen is not None
                dx, scales = by_rows(call.frozen, scaled, gradient=True)
            else:
                over, used = (g, merged_weight(weight, terms)) if call.merge else (scaled, weight)
                if first is not None and laid is None:
                    laid = first_input_gradient(sweep, *first)
                dx = linear(over, used.t()) if laid is None else laid.addmm_(over, used)
            finish_(dx, scales, None, None, [input_gradient(u, t) for u, t in added])
            dx = dx.view(*grads[0].shape[:-1], ctx.columns)
        return None, None, dx, dweight, g.sum(0) if needs_bias else None, *dterms


def adapted_values(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: Sequence[Term],
    merge: bool,
    frozen: FrozenProduct | None,
    keep: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """y, and h (T, r) of each term that was added, or that backward needs since it does not read x (not `keep`)."""
    if weight is not None and keep and all(t.merged for t in terms):  # all that there is to do
        return unviewed(flat(first_product(x, merged_weight(weight, terms), bias, terms)), x), [None] * len(terms)
    gain, rows = None if merge else total_gain(terms), flat(x)
    used = merged_weight(weight, terms) if weight is not None and merge else weight
    wanted = [not t.merged or (not keep and t.B.requires_grad) for t in terms]
    sweep = sweep_over([t for t, want in zip(terms, wanted, strict=True) if want], rows)
    products = [project(sweep, t, rows) if want else None for t, want in zip(terms, wanted, strict=True)]
    added = [(h, t) for h, t in zip(products, terms, strict=True) if h is not None and not t.merged]
    laid = None  # one adapter's change and the bias, onto which the base's product is added
    if added and used is not None and gain is None and is_laid_first(x, used, bias, terms):
        laid = first_change(sweep, *added.pop(0), bias)
    sweep.run()
    scales = shift = None
    if used is None:
        assert frozen is not None
        y, scales = by_rows(frozen, x)
        shift = bias
    elif laid is not None:
        y = laid.addmm_(rows, used.t())
    else:
        y = flat(first_product(x, used, bias, terms))
        if gain is not None and bias is not None:  # c z + b from z + b: exact where gain is 0
            shift = -gain * bias
    finish_(y, scales, gain, shift, [change(h, t) for h, t in added])
    return unviewed(y, x), products


def unviewed(y: Tensor, x: Tensor) -> Tensor:
    """y (T, out) in the form of x (..., in), which autograd does not take for a view: `relu_(y)` is allowed."""
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])
    return shaped


def as_autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The arguments in the dtype that `F.linear` would run in under the autocast that is in force, if any."""
    if not torch._C._is_any_autocast_enabled():
        return x, weight, bias
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)
