"""The fused adapted linear: base product, bias, adapters, dropout and their backward as one operation.

    y = x Wᵀ + b + Σ ( gain ⊙ (x Wᵀ) + s (drop(x) Aᵀ) Bᵀ )

with x (T, in), W (out, in), A (r, in), B (out, r), gain (out,). Let g = ∂L/∂y, c = 1 + Σ gain and, per adapter,
h = drop(x) Aᵀ and u = s g B, both (T, r). Then

    ∂x    = (g ⊙ c) W + Σ drop(u A)      one buffer; the adapters are added to it in place
    ∂A    = uᵀ drop(x)                   ∂B = s gᵀ h
    ∂gain = Σ_t g ⊙ (x Wᵀ)               read off the output (see `gain_grad`): no second base product

Where W' = c W + Σ s B A is cheaper to form than the adapters are to apply (select.py: many rows, no dropout, 32 or 64
bit), the base product runs on W' and the adapters cost nothing in forward and in ∂x; W' is formed again in backward,
not kept. Otherwise they are added to the base's output by `addmm_`: no scale pass, no add pass, no copy.

x is saved as it came, so that all projections of one input keep one copy. Dropout is made again from its seed. Nothing
is computed for an input that needs no gradient. The plain twin is `adapted_linear_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deltaw.ops.dropout import draw_seed, keep_mask
from deltaw.ops.select import use_merged


class Factors(Protocol):
    """The change ΔW = diag(gain) W + scale · B A of one adapter, as `deltaw.core.variant.LowRank`."""

    @property
    def A(self) -> Tensor: ...  # noqa: D102
    @property
    def B(self) -> Tensor: ...  # noqa: D102
    @property
    def scale(self) -> float: ...  # noqa: D102
    @property
    def gain(self) -> Tensor | None: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def dropout_at(self) -> str: ...  # noqa: D102


class FrozenProduct(Protocol):
    """A frozen weight W (out, in) kept in some other form, that knows its two products."""

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ: (..., in) -> (..., out). A fresh tensor."""

    def matmul_grad(self, g: Tensor) -> Tensor:
        """g W: (..., out) -> (..., in). A fresh tensor."""


class Term(NamedTuple):
    """One adapter's part of the operation: its tensors, and the dropout that is in force for this call."""

    A: Tensor
    B: Tensor
    scale: float
    gain: Tensor | None
    p: float
    at_output: bool
    seed: Tensor | None


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
    """
    if not adapters and frozen is None:
        assert weight is not None
        return F.linear(x, weight, bias)
    x, weight, bias = as_autocast(x, weight, bias)
    terms = [in_force(a, training, x.device) for a in adapters]
    if transformed():
        return plain(x, weight, bias, terms, frozen)
    merged = (
        weight is not None
        and not any(t.p for t in terms)
        and use_merged(weight.shape[0], weight.shape[1], math.prod(x.shape[:-1]), x.dtype)
    )
    tensors: list[Tensor | None] = []
    plan: list[tuple[float, float, bool]] = []
    for t in terms:
        tensors += [t.A, t.B, t.gain, t.seed]
        plan.append((t.scale, t.p, t.at_output))
    y: Tensor = AdaptedLinear.apply(tuple(plan), merged, frozen, x, weight, bias, *tensors)
    return y


def adapted_linear_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Sequence[Factors],
    *,
    training: bool,
    frozen: FrozenProduct | None = None,
) -> Tensor:
    """The same function in plain differentiable PyTorch; with the same generator state, the same dropout."""
    x, weight, bias = as_autocast(x, weight, bias)
    return plain(x, weight, bias, [in_force(a, training, x.device) for a in adapters], frozen)


def plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: Sequence[Term], frozen: FrozenProduct | None
) -> Tensor:
    """The formula of the header, term by term."""
    if frozen is not None:
        base: Tensor = FrozenLinear.apply(frozen, x)
    else:
        assert weight is not None
        base = F.linear(x, weight)
    y = base if bias is None else base + bias
    rows = math.prod(x.shape[:-1])
    for t in terms:
        inputs, A, B = x, t.A.to(x.dtype), t.B.to(x.dtype)
        if t.seed is not None and not t.at_output:
            inputs = x * keep_mask(t.seed, rows, x.shape[-1], t.p, x.dtype).view(x.shape)
        change = t.scale * F.linear(F.linear(inputs, A), B)
        if t.seed is not None and t.at_output:
            change = change * keep_mask(t.seed, rows, change.shape[-1], t.p, x.dtype).view(change.shape)
        if t.gain is not None:
            change = change + t.gain * base
        y = y + change.to(y.dtype)
    return y


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ for a W that only knows its two products."""

    @staticmethod
    def forward(ctx: Any, frozen: FrozenProduct, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.frozen = frozen
        return frozen.matmul(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """(..., out) -> (..., in)."""
        return None, ctx.frozen.matmul_grad(grads[0]) if ctx.needs_input_grad[1] else None


class AdaptedLinear(torch.autograd.Function):
    """The operation and its hand-written derivative; see the header of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[tuple[float, float, bool], ...],
        merged: bool,
        frozen: FrozenProduct | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """See `adapted_linear`; `tensors` are A, B, gain, seed of each adapter, `plan` their scale, p, at_output."""
        terms = unpack(plan, tensors)
        keep: list[Tensor | None] = [None] * len(terms)  # h of each adapter, (T, r)
        if merged:
            assert weight is not None
            y = F.linear(x, merge(weight, terms), bias)
        else:
            if frozen is not None:
                y = frozen.matmul(x)
                if bias is not None:
                    y += bias
            else:
                assert weight is not None
                y = F.linear(x, weight, bias)
            shape = y.shape
            y = y.reshape(-1, shape[-1]) if y.numel() else y.view(math.prod(shape[:-1]), shape[-1])
            gain = total_gain(terms)
            if gain is not None:  # c (x Wᵀ) + b from y = x Wᵀ + b: exact where gain is 0
                y.mul_(1 + gain)
                if bias is not None:
                    y.sub_(gain * bias)
            for i, t in enumerate(terms):
                inputs = dropped_input(flat(x), t)
                h = inputs @ t.A.to(x.dtype).t()  # (T, in) -> (T, r)
                add_low_rank(y, h, t.B.to(x.dtype), t.scale, output_mask(y, t))
                keep[i] = h
            y = y.view(shape)
        ctx.plan, ctx.merged, ctx.frozen = plan, merged, frozen
        ctx.save_for_backward(x, weight, bias, *tensors, *keep)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The derivatives of the header; None for every input that needs none."""
        x, weight, bias, *rest = ctx.saved_tensors
        count = len(ctx.plan)
        terms = unpack(ctx.plan, rest[: 4 * count])
        keep = rest[4 * count :]
        needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad[3:]
        g = flat(grads[0]).contiguous()  # (T, out)
        rows = flat(x)  # (T, in)
        gain = total_gain(terms)

        scaled = g
        if gain is not None and (needs_weight or (needs_x and not ctx.merged)):
            scaled = (g * (1 + gain)).to(g.dtype)
        dx: Tensor | None = None
        if needs_x:
            if ctx.merged:
                dx = g @ merge(weight, terms)
            else:
                dx = scaled @ weight if ctx.frozen is None else ctx.frozen.matmul_grad(scaled)
        dweight = scaled.t() @ rows if needs_weight else None
        dbias = g.sum(0) if needs_bias else None

        out: list[Tensor | None] = []
        base: Tensor | None = None
        for i, t in enumerate(terms):
            needs_A, needs_B, needs_gain, _ = needs[4 * i : 4 * i + 4]
            dA = dB = dgain = None
            if needs_A or needs_B or needs_x:
                through = g if t.seed is None or not t.at_output else g * output_mask(g, t)
                mask = input_mask(rows, t)
                A, B = t.A.to(x.dtype), t.B.to(x.dtype)
                if needs_A or (needs_x and not ctx.merged):
                    u = F.linear(through, (B.t() * t.scale).contiguous())  # (T, out) -> (T, r)
                    if needs_A:
                        dA = (u.t() @ (rows if mask is None else rows * mask)).to(t.A.dtype)
                    if needs_x and not ctx.merged:
                        assert dx is not None
                        if mask is None:
                            dx.addmm_(u, A)
                        else:
                            dx.addcmul_(u @ A, mask)
                if needs_B:
                    h = keep[i]
                    if h is None:
                        h = (rows if mask is None else rows * mask) @ A.t()
                    dB = (h.t() @ through).t().to(t.B.dtype).mul_(t.scale)  # (r, out) is the fast orientation
            if needs_gain:
                assert t.gain is not None
                if base is None:
                    base = rows @ weight.t() if ctx.frozen is None else ctx.frozen.matmul(rows)
                dgain = (g * base).sum(0, dtype=t.gain.dtype)
            out += [dA, dB, dgain, None]
        return None, None, None, None if dx is None else dx.view(x.shape), dweight, dbias, *out


def in_force(adapter: Factors, training: bool, device: torch.device) -> Term:
    """The adapter as it acts in this call: without dropout in eval, with a fresh seed in training."""
    p = adapter.dropout if training else 0.0
    seed = draw_seed(device) if p else None
    return Term(adapter.A, adapter.B, adapter.scale, adapter.gain, p, adapter.dropout_at == "output", seed)


def unpack(plan: Sequence[tuple[float, float, bool]], tensors: Sequence[Any]) -> list[Term]:
    """The terms again, from what an autograd function can be given: a tuple of constants and a flat list of tensors."""
    terms = []
    for i, (scale, p, at_output) in enumerate(plan):
        A, B, gain, seed = tensors[4 * i : 4 * i + 4]
        terms.append(Term(A, B, scale, gain, p, at_output, seed))
    return terms


def flat(x: Tensor) -> Tensor:
    """(..., k) -> (T, k), a view where x's strides allow; empty batches too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def total_gain(terms: Sequence[Term]) -> Tensor | None:
    """Σ gain, (out,), or None if no adapter has one."""
    gains = [t.gain for t in terms if t.gain is not None]
    return sum(gains[1:], gains[0]) if gains else None


def merge(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """W' = (1 + Σ gain) W + Σ s B A, (out, in), a fresh tensor. With B = 0 and gain = 0 it is W to the bit."""
    gain = total_gain(terms)
    if gain is not None:
        changed = weight * (1 + gain).unsqueeze(1)
        rest = terms
    else:
        first, *rest = terms
        changed = torch.addmm(weight, first.B.to(weight.dtype), first.A.to(weight.dtype), alpha=first.scale)
    for t in rest:
        changed.addmm_(t.B.to(weight.dtype), t.A.to(weight.dtype), alpha=t.scale)
    return changed


def add_low_rank(y: Tensor, h: Tensor, B: Tensor, scale: float, mask: Tensor | None) -> None:
    """y += s h Bᵀ, in place; with `mask` (T, out) on what is added."""
    if mask is None:
        y.addmm_(h, B.t(), alpha=scale)
    else:
        y.addcmul_(h @ B.t(), mask, value=scale)


def input_mask(x: Tensor, t: Term) -> Tensor | None:
    """The mask on x (T, in), or None where A sees all of it."""
    return None if t.seed is None or t.at_output else keep_mask(t.seed, x.shape[0], x.shape[1], t.p, x.dtype)


def output_mask(y: Tensor, t: Term) -> Tensor | None:
    """The mask on the low-rank output (T, out), or None."""
    return None if t.seed is None or not t.at_output else keep_mask(t.seed, y.shape[0], y.shape[1], t.p, y.dtype)


def dropped_input(x: Tensor, t: Term) -> Tensor:
    """What A sees of x (T, in)."""
    mask = input_mask(x, t)
    return x if mask is None else mask.mul_(x)


def as_autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The arguments in the dtype that `F.linear` would run in under the autocast that is in force, if any."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)


def transformed() -> bool:
    """Whether `torch.func` transforms or forward-mode differentiation are at work, which need plain operations."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0  # type: ignore[attr-defined]
    )
