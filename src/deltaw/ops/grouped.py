"""One batch, many adapters: the adapted linear with its own adapters for every segment of rows, in eval and in training.

    y[seg] = x[seg] Wᵀ + b + Σ over the segment's adapters of their change of x[seg]

Rows are sorted by adapter once per batch, at the model's entry (model/rows.py), so that a segment is a slice: no gather,
no scatter, no mask. All rows share one base product, and every segment adds its factors in place: a weight of its own
for each segment (as in linear.py) would cut that product into pieces, which costs more than the thin products do. Rows
without adapters cost nothing more. No row is ever multiplied with another row's adapter, not even by zero, so an adapter
full of NaN changes its own rows only.

Without gradients one compiled sweep makes the changes of all segments where it can (`is_swept`, cpu_thin.py), each row's with
its own factors, before the base's product, which is added to them. Elsewhere the same steps as with gradients run outside of
the autograd function, and a plain term, one without dropout whose factors have y's dtype, is two calls (`is_plain`):
steps.py's bookkeeping would cost as much as the thin products do. Short segments of equal length are put side by side where
their factors are small (`runs`, `add_stacked_`): two batched products instead of two calls for each of them,

    h[i] = A[i] x[i]ᵀ,  y[i] += s[i] (B[i] h[i])ᵀ,    A (n, r, in), B (n, out, r), x (n, tokens, in), y (n, tokens, out).

(With one wide A and one wide B, all rows of which see all adapters, a mask has to take out what is not theirs: n times the
work, and 0 x NaN is NaN. It was slower wherever it was measured, docs/decisions/023.)

The plain twin is `grouped_linear_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.ops.cpu_thin import Segments, Sweep, takes
from deltaw.ops.gain import column_dots, scale_and_shift_
from deltaw.ops.leaves import as_views
from deltaw.ops.linear import as_autocast, plain, unviewed
from deltaw.ops.matmul import linear, thin, transformed
from deltaw.ops.select import is_narrow, is_stacked
from deltaw.ops.steps import (
    backward_factors,
    base_values,
    change,
    finish_,
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
    pack,
    total_gain,
    unpack,
)
from deltaw.ops.twice import apart, twice

Span = tuple[int, int, Plan]
"""First token, last token, and the constants of the segment's terms."""

Part = tuple[int, int, Sequence[Term]]
"""First row (or token), last row, and the terms of a segment, one at least."""


class Segment(NamedTuple):
    """Rows start..stop of the batch (its first dimension) and the adapters that they have, none for the bare base."""

    start: int
    stop: int
    adapters: Sequence[Factors] = ()


def grouped_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[Segment],
    *,
    training: bool,
    frozen: FrozenProduct | None = None,
) -> Tensor:
    """The adapted linear of each segment: x (rows, ..., in) -> (rows, ..., out). Arguments as `adapted_linear`.

    Raises:
        ConfigError: the segments overlap, are out of order, or reach beyond x's rows. Rows in none have no adapter.
    """
    x, weight, bias = as_autocast(x, weight, bias)
    parts = adapted_parts(segments, training, x)
    if transformed():
        return grouped_plain(x, weight, bias, parts, frozen)
    per_row = math.prod(x.shape[1:-1])
    by_token = [(start * per_row, stop * per_row, terms) for start, stop, terms in parts]
    if not torch.is_grad_enabled():
        return grouped_values(x, weight, bias, by_token, frozen, False)[0]
    spans: list[Span] = []
    tensors: list[Tensor | None] = []
    for start, stop, terms in by_token:
        plan, own = pack(terms)
        spans.append((start, stop, plan))
        tensors += own
    y: Tensor = GroupedLinear.apply(tuple(spans), frozen, x, *as_views((weight, bias, *tensors)))  # type: ignore[no-untyped-call]
    return y


def grouped_linear_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[Segment],
    *,
    training: bool,
    frozen: FrozenProduct | None = None,
) -> Tensor:
    """The same function, segment by segment, in plain differentiable PyTorch."""
    x, weight, bias = as_autocast(x, weight, bias)
    return grouped_plain(x, weight, bias, adapted_parts(segments, training, x), frozen)


def grouped_plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    parts: Sequence[Part],
    frozen: FrozenProduct | None,
) -> Tensor:
    """Every segment as if it were alone, put together again."""
    pieces, done = [], 0
    for start, stop, terms in parts:
        pieces.append(plain(x[done:start], weight, bias, (), frozen))
        pieces.append(plain(x[start:stop], weight, bias, terms, frozen))
        done = stop
    pieces.append(plain(x[done:], weight, bias, (), frozen))
    return torch.cat(pieces)


def adapted_parts(segments: Sequence[Segment], training: bool, x: Tensor) -> list[Part]:
    """First row, last row and terms of each segment that has rows and adapters.

    Raises:
        ConfigError: segments overlap, are out of order, or reach beyond the rows of x.
    """
    done = 0
    for s in segments:
        if not done <= s.start <= s.stop <= x.shape[0]:
            raise ConfigError(
                f"segments must be in order, apart, and within the batch's {x.shape[0]} rows; found {s.start}..{s.stop} "
                f"after row {done}: sort the rows by adapter first"
            )
        done = s.stop
    return [
        (start, stop, [in_force(a, training, False, x.device) for a in adapters])
        for start, stop, adapters in segments
        if adapters and start < stop
    ]


def grouped_again(ctx: Any, saved: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """The plain twin of a call, for twice.py."""
    x, weight, bias, *tensors = apart(saved[: 3 + TENSORS * sum(len(plan) for *_, plan in ctx.spans)])
    y = grouped_plain(flat(x), weight, bias, unpack_spans(ctx.spans, tensors), ctx.frozen)
    return y.view(*x.shape[:-1], y.shape[1]), [None, None, x, weight, bias, *tensors]


class GroupedLinear(torch.autograd.Function):
    """Values and derivatives as in linear.py's header, each segment with its own terms on its own slice."""

    @staticmethod
    def forward(
        ctx: Any,
        spans: tuple[Span, ...],
        frozen: FrozenProduct | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """`spans` are (first token, last token, plan) of each segment; `tensors` their packed terms in turn."""
        y, products = grouped_values(x, weight, bias, unpack_spans(spans, tensors), frozen, True)
        ctx.spans, ctx.frozen = spans, frozen
        ctx.save_for_backward(x, weight, bias, *tensors, *products)
        return y

    @staticmethod
    @twice(grouped_again)
    def backward(ctx: Any, saved: Sequence[Any], *grads: Tensor) -> tuple[Any, ...]:
        """None for every input that needs no gradient."""
        x, weight, _, *rest = saved
        segments = unpack_spans(ctx.spans, rest)
        count = sum(len(terms) for *_, terms in segments)
        products = iter(rest[TENSORS * count :])
        needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad[2:]
        needs_of = iter([needs[TENSORS * i : TENSORS * (i + 1)] for i in range(count)])
        g = flat(grads[0]).contiguous()
        rows = flat(x)

        scaled = g
        if (needs_x or needs_weight) and any(total_gain(terms) is not None for *_, terms in segments):
            scaled = g.clone()
            for start, stop, terms in segments:
                gain = total_gain(terms)
                if gain is not None:
                    scaled[start:stop].mul_(1 + gain)
        dx: Tensor | None = None
        if needs_x:
            dx = flat(ctx.frozen.matmul_grad(scaled)) if weight is None else linear(scaled, weight.t())
        out: list[Tensor | None] = []
        for start, stop, terms in segments:
            base: Tensor | None = None
            for t in terms:
                needs_A, needs_B, needs_gain, _ = next(needs_of)
                own, h = rows[start:stop], next(products)
                sweep = sweep_over([t], own, g)
                dA, dB, u = backward_factors(sweep, t, g[start:stop], own, h, needs_A, needs_B, needs_x)
                sweep.run()
                if dx is not None and u is not None:
                    part = dx[start:stop]
                    finish_(part, None, None, None, [input_gradient(u, t)])
                dgain = None
                if needs_gain and t.gain is not None:
                    if base is None:
                        base = base_values(own, weight, ctx.frozen)
                    dgain = column_dots(g[start:stop], base).to(t.gain.dtype)
                out += [dA, dB, dgain, None]
        dweight = linear(scaled.t(), rows.t()) if needs_weight else None
        dbias = g.sum(0) if needs_bias else None
        return None, None, None if dx is None else dx.view(x.shape), dweight, dbias, *out


def grouped_values(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[Part],
    frozen: FrozenProduct | None,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y (rows, ..., out) and, to `keep` for backward, h = in(x) Aᵀ of every term in turn; `segments` count tokens."""
    rows, products = flat(x), list[Tensor]()
    if not keep and is_swept(rows, bias, segments):
        return unviewed(swept_values(x, weight, bias, segments, frozen), x), products
    if weight is None:
        assert frozen is not None
        y, scales = by_rows(frozen, x)
        finish_(y, scales, None, bias, ())
    else:
        y = flat(first_product(x, weight, bias, [t for _, _, terms in segments for t in terms]))
    for run in [[s] for s in segments] if keep else runs(segments, y.dtype):
        if len(run) > 1:
            add_stacked_(y, rows, run)
            continue
        start, stop, terms = run[0]
        part, own = y[start:stop], rows[start:stop]
        gain = total_gain(terms)
        if gain is not None:
            scale_and_shift_(part, gain, None if bias is None else -gain * bias)
        for t in terms:
            if not keep and is_plain(t, y.dtype):
                part.addmm_(thin(own, t.A), t.B.t(), alpha=t.scale)
                continue
            sweep = sweep_over([t], own)
            h = project(sweep, t, own)
            sweep.run()
            finish_(part, None, None, None, [change(h, t)])
            if keep:
                products.append(h)
    return unviewed(y, x), products


def is_swept(rows: Tensor, bias: Tensor | None, segments: Sequence[Part]) -> bool:
    """Whether one compiled sweep makes the changes of all segments: each has one adapter, all of one small rank."""
    if len(segments) < 2 or any(len(terms) != 1 or terms[0].gain is not None for *_, terms in segments):
        return False
    terms = [only for *_, (only,) in segments]
    rank = terms[0].A.shape[0]
    if any(t.A.shape[0] != rank or t.seed is not None for t in terms) or not is_narrow(rank, shared=True):
        return False
    return takes(rows, factors=[bias, *(z for t in terms for z in (t.A, t.B))])


def swept_values(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, segments: Sequence[Part], frozen: FrozenProduct | None
) -> Tensor:
    """y (T, out): all segments' changes in one sweep, before the base's product where that can be added to them."""
    rows, terms = flat(x), [only for *_, (only,) in segments]
    parts: list[tuple[int, Term | None]] = []
    done = 0
    for (start, stop, _), t in zip(segments, terms):
        if start > done:
            parts.append((start, None))
        parts.append((stop, t))
        done = stop
    if done < rows.shape[0]:
        parts.append((rows.shape[0], None))
    bare = len(parts) > len(terms)  # rows without an adapter: to the bit those of the base alone
    own, sweep = Segments(parts), Sweep()
    h = sweep.shrink(rows, own)
    laid = weight is not None and (bias is not None or not bare) and is_laid_first(x, weight, bias, terms)
    if weight is None:
        assert frozen is not None
        y, scales = by_rows(frozen, x)
        sweep.expand_(y, h, own, 1.0, rowscale=scales, shift=bias)
    elif laid:
        y = rows.new_empty(rows.shape[0], weight.shape[0])
        sweep.expand_(y, h, own, 1.0, shift=bias, first=True)
    else:
        y = flat(first_product(x, weight, bias, terms))
        sweep.expand_(y, h, own, 1.0)
    sweep.run()
    return y.addmm_(rows, weight.t()) if laid and weight is not None else y


def is_plain(t: Term, dtype: torch.dtype) -> bool:
    """Whether a term's two products can be made as they stand: no dropout, and factors of y's dtype."""
    return t.seed is None and t.A.dtype == t.B.dtype == dtype


def runs(segments: Sequence[Part], dtype: torch.dtype) -> list[list[Part]]:
    """The segments in their order, those that `add_stacked_` takes together in one list."""
    found: list[list[Part]] = []
    last: object = None
    for segment in segments:
        start, stop, terms = segment
        t, kind = terms[0], None
        if len(terms) == 1 and t.gain is None and is_plain(t, dtype):
            rank, columns = t.A.shape
            if is_stacked(t.B.shape[0], columns, stop - start, rank, t.A.device.type):
                kind = (stop - start, t.A.shape, t.B.shape)
        if kind is not None and kind == last and start == found[-1][-1][1]:
            found[-1].append(segment)
        else:
            found.append([segment])
        last = kind
    return found


FEW = 8
"""Tokens of a segment from which on MKL multiplies A xᵀ faster than x Aᵀ, if there are several of them at once."""


def add_stacked_(y: Tensor, rows: Tensor, run: Sequence[Part]) -> None:
    """y[seg] += s (A x)ᵀ Bᵀ for n segments of equal length, one behind the other, with one plain term of one shape each."""
    terms = [only for _, _, (only,) in run]
    part = slice(run[0][0], run[-1][1])
    n, each = len(run), run[0][1] - run[0][0]
    x, own = (z[part].view(n, each, z.shape[1]) for z in (rows, y))
    A, B = torch.stack([t.A for t in terms]), torch.stack([t.B for t in terms])
    h = torch.bmm(x, A.mT) if each < FEW else torch.bmm(A, x.mT).mT
    scale = terms[0].scale
    if any(t.scale != scale for t in terms):
        h, scale = h * h.new_tensor([t.scale for t in terms]).view(-1, 1, 1), 1.0
    own.baddbmm_(h, B.mT, alpha=scale)


def unpack_spans(spans: Sequence[Span], tensors: Sequence[Any]) -> list[tuple[int, int, list[Term]]]:
    """(first token, last token, terms) of each segment."""
    found, at = [], 0
    for start, stop, plan in spans:
        found.append((start, stop, unpack(plan, tensors[at : at + TENSORS * len(plan)])))
        at += TENSORS * len(plan)
    return found
