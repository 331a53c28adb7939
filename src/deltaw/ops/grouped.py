"""One batch, many adapters: the adapted linear with its own adapters for every segment of rows, in eval and in training.

    y[seg] = x[seg] Wᵀ + b + Σ over the segment's adapters of their change of x[seg]

Rows are sorted by adapter once per batch (`sort_rows`), so that a segment is a slice: no gather, no scatter, no mask.
A long segment runs on its own W' = W + s B A (select.py); all other rows share one base product, and short segments add
their factors in place. Rows without adapters cost nothing more. No row is ever multiplied with another row's adapter,
not even by zero, so an adapter full of NaN changes its own rows only.

The plain twin is `grouped_linear_reference`. For very many very short segments see stacked.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deltaw.errors import ConfigError
from deltaw.ops.linear import (
    add_,
    as_autocast,
    backward_factors,
    column_dots,
    plain,
    project,
    scale_and_shift_,
    transformed,
)
from deltaw.ops.select import use_merged
from deltaw.ops.terms import (
    TENSORS,
    Factors,
    FrozenProduct,
    Plan,
    Term,
    flat,
    in_force,
    merged_weight,
    pack,
    total_gain,
    unpack,
)


class Segment(NamedTuple):
    """Rows start..stop of the batch (its first dimension) and the adapters that they have, none for the bare base."""

    start: int
    stop: int
    adapters: Sequence[Factors] = ()


def sort_rows(owners: Sequence[object]) -> tuple[list[int], list[int], list[tuple[object, int, int]]]:
    """The order that puts equal owners side by side, its inverse, and (owner, start, stop) of each run.

    `x[order]` is sorted, `y[inverse]` is in the caller's order again.
    """
    groups: dict[object, list[int]] = {}
    for row, owner in enumerate(owners):
        groups.setdefault(owner, []).append(row)
    order = [row for rows in groups.values() for row in rows]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    runs, start = [], 0
    for owner, rows in groups.items():
        runs.append((owner, start, start + len(rows)))
        start += len(rows)
    return order, inverse, runs


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
    check(segments, x.shape[0])
    x, weight, bias = as_autocast(x, weight, bias)
    per_row = math.prod(x.shape[1:-1])
    spans: list[tuple[int, int, bool, Plan]] = []
    tensors: list[Tensor | None] = []
    parts: list[tuple[int, int, list[Term]]] = []
    for start, stop, adapters in segments:
        if not adapters or start == stop:
            continue
        tokens = (stop - start) * per_row
        merge = weight is not None and use_merged(weight.shape[0], weight.shape[1], tokens, x.dtype)
        terms = [in_force(a, training, merge, x.device) for a in adapters]
        merge = merge and all(t.merged for t in terms)
        terms = [t._replace(merged=merge) for t in terms]
        plan, own = pack(terms)
        spans.append((start * per_row, stop * per_row, merge, plan))
        parts.append((start, stop, terms))
        tensors += own
    if transformed():
        return grouped_plain(x, weight, bias, parts, frozen)
    y: Tensor = GroupedLinear.apply(tuple(spans), frozen, x, weight, bias, *tensors)  # type: ignore[no-untyped-call]
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
    parts = [
        (start, stop, [in_force(a, training, False, x.device) for a in adapters])
        for start, stop, adapters in segments
        if adapters and start < stop
    ]
    return grouped_plain(x, weight, bias, parts, frozen)


def grouped_plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    parts: Sequence[tuple[int, int, Sequence[Term]]],
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


def check(segments: Sequence[Segment], rows: int) -> None:
    """Segments are in order, do not overlap and lie within the rows."""
    done = 0
    for s in segments:
        if not done <= s.start <= s.stop <= rows:
            raise ConfigError(
                f"segments must be in order, apart, and within the batch's {rows} rows; found {s.start}..{s.stop} "
                f"after row {done}: sort the rows by adapter first (sort_rows)"
            )
        done = s.stop


class GroupedLinear(torch.autograd.Function):
    """Values and derivatives as in linear.py's header, each segment with its own terms on its own slice."""

    @staticmethod
    def forward(
        ctx: Any,
        spans: tuple[tuple[int, int, bool, Plan], ...],
        frozen: FrozenProduct | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """`spans` are (first token, last token, merge, plan) of each segment; `tensors` their packed terms in turn."""
        rows = flat(x)
        segments = unpack_spans(spans, tensors)
        products: list[Tensor | None] = []
        if weight is None:
            assert frozen is not None
            y = flat(frozen.matmul(x))
        elif any(merge for _, _, merge, _ in segments):
            y = rows.new_empty(rows.shape[0], weight.shape[0])
            for start, stop, terms in runs(segments, rows.shape[0]):
                own = weight if terms is None else merged_weight(weight, terms)
                product_into(y[start:stop], rows[start:stop], own, bias)
        else:
            y = flat(F.linear(x, weight, bias))
        if weight is None and bias is not None:
            y.add_(bias)
        for start, stop, merge, terms in segments:
            part = y[start:stop]
            gain = None if merge else total_gain(terms)
            if gain is not None:
                scale_and_shift_(part, gain, None if bias is None else -gain * bias)
            for t in terms:
                h = None if merge else project(t, rows[start:stop])
                if h is not None:
                    add_(part, h, t)
                products.append(h)
        ctx.spans, ctx.frozen = spans, frozen
        ctx.save_for_backward(x, weight, *tensors, *products)
        out = weight.shape[0] if weight is not None else y.shape[1]
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], out])  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """None for every input that needs no gradient."""
        x, weight, *rest = ctx.saved_tensors
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
            for start, stop, merge, terms in segments:
                gain = total_gain(terms)
                if gain is not None and (needs_weight or not merge):
                    scaled[start:stop].mul_(1 + gain)
        dx: Tensor | None = None
        if needs_x:
            if weight is None:
                dx = ctx.frozen.matmul_grad(scaled)
            elif any(merge for _, _, merge, _ in segments):
                dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
                for start, stop, inside in runs(segments, rows.shape[0]):
                    source, own = (scaled, weight) if inside is None else (g, merged_weight(weight, inside))
                    torch.mm(source[start:stop], own, out=dx[start:stop])
            else:
                dx = scaled @ weight
        out: list[Tensor | None] = []
        for start, stop, merge, terms in segments:
            base: Tensor | None = None
            for t in terms:
                needs_A, needs_B, needs_gain, _ = next(needs_of)
                part = None if dx is None or merge else dx[start:stop]
                dA, dB = backward_factors(t, g[start:stop], rows[start:stop], next(products), needs_A, needs_B, part)
                dgain = None
                if needs_gain and t.gain is not None:
                    if base is None:
                        own_rows = rows[start:stop]
                        base = own_rows @ weight.t() if weight is not None else ctx.frozen.matmul(own_rows)
                    dgain = column_dots(g[start:stop], base).to(t.gain.dtype)
                out += [dA, dB, dgain, None]
        dweight = scaled.t() @ rows if needs_weight else None
        dbias = g.sum(0) if needs_bias else None
        return None, None, None if dx is None else dx.view(x.shape), dweight, dbias, *out


Spanned = tuple[int, int, bool, list[Term]]


def unpack_spans(spans: Sequence[tuple[int, int, bool, Plan]], tensors: Sequence[Any]) -> list[Spanned]:
    """(first token, last token, merge, terms) of each segment."""
    found, at = [], 0
    for start, stop, merge, plan in spans:
        found.append((start, stop, merge, unpack(plan, tensors[at : at + TENSORS * len(plan)])))
        at += TENSORS * len(plan)
    return found


def runs(segments: Sequence[Spanned], tokens: int) -> list[tuple[int, int, list[Term] | None]]:
    """The base products that are needed: each merged segment its own, and the stretches between them, with None."""
    found: list[tuple[int, int, list[Term] | None]] = []
    done = 0
    for start, stop, merge, terms in segments:
        if merge:
            if done < start:
                found.append((done, start, None))
            found.append((start, stop, terms))
            done = stop
    if done < tokens:
        found.append((done, tokens, None))
    return found


def product_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x Wᵀ + b, written where it belongs."""
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
