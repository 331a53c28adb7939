"""Which kernels a shape runs on, by which rule, and how long each takes here: what `deltaw ops` prints.

The rules are those that run: select.py (composed, merged or added), matmul.py (oneDNN or MKL), cpu_thin.py
(compiled or torch's), choices.py (8 bit or dense).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.ops.choices import Choices
from deltaw.ops.compiled import library as compiled_library
from deltaw.ops.composed import composed
from deltaw.ops.int8 import Int8Weight, int8_available, int8_matmul, int8_matmul_grad, quantize_int8
from deltaw.ops.linear import AdaptedLinear, Call
from deltaw.ops.matmul import library, linear
from deltaw.ops.select import Explanation, explain, is_formed, is_narrow, is_small
from deltaw.ops.terms import FrozenProduct, Term, pack

DROPOUT = 0.05
REPEATS = 5


class Shape(NamedTuple):
    """x (tokens, columns_in), W (rows_out, columns_in), and an adapter of `rank`."""

    tokens: int
    columns_in: int
    rows_out: int
    rank: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.columns_in} -> {self.rows_out}, rank {self.rank}"


TYPICAL = (
    Shape(128, 384, 384, 8),
    Shape(1024, 384, 384, 8),
    Shape(1024, 384, 1536, 8),
    Shape(3200, 384, 1536, 8),
    Shape(512, 576, 1536, 8),
    Shape(2048, 1024, 4096, 16),
)
"""Layers of MiniLM, whisper-tiny, SmolLM2 and DeBERTa-v3-large, with few and with many rows."""


@dataclass(frozen=True)
class Kernels:
    """The rules for one shape in fp32. `int8`: forward and input gradient on an 8-bit base."""

    shape: Shape
    products: str
    thin: str
    adapter: Explanation
    dropped: Explanation
    int8: tuple[bool, bool]

    def lines(self) -> list[str]:
        """For people."""
        words = ["8 bit" if narrow else "on the dense weight, formed from its codes" for narrow in self.int8]
        return [
            f"{self.shape}",
            f"  fp32 products     {self.products}",
            f"  thin products     {self.thin}",
            f"  adapter           {self.adapter}",
            f"  with dropout      {self.dropped}",
            f"  on an int8 base   forward {words[0]}, input gradient {words[1]}",
        ]


def kernels(shape: Shape, choices: Choices) -> Kernels:
    """The rules for one shape; `choices` is the record (or, if it is timed, the judge) of 8-bit kernels."""
    tokens, columns_in, rows_out, rank = shape
    return Kernels(
        shape,
        "torch's own choice" if is_small(rows_out, columns_in, tokens) else library(tokens, rows_out, columns_in),
        thin_products(rank),
        explain(rows_out, columns_in, tokens, rank),
        explain(rows_out, columns_in, tokens, rank, dropout=DROPOUT),
        (False, False) if is_formed(rows_out, columns_in) else choices.choose(rows_out, columns_in, tokens),
    )


def thin_products(rank: int) -> str:
    """Where an adapter's own products run, of fp32 on a CPU, and why."""
    compiled = compiled_library()
    if isinstance(compiled, str):
        return f"torch's own: {compiled}"
    if is_narrow(rank):
        return "compiled"
    if is_narrow(rank, shared=True):
        return "compiled in backward and with dropout, else torch's own (rank, processor)"
    return "compiled with dropout, else torch's own (rank, processor)"


@dataclass(frozen=True)
class Dequantised:
    """A W (out, in) in 8 bit that is made dense for each product."""

    weight: Int8Weight

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return linear(x, self.weight.dense())

    def matmul_grad(self, g: Tensor) -> Tensor:
        """g W."""
        return linear(g, self.weight.dense().t())


@dataclass(frozen=True)
class Narrow:
    """A W (out, in) in 8 bit."""

    weight: Int8Weight

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return int8_matmul(x, self.weight)

    def matmul_grad(self, g: Tensor) -> Tensor:
        """g W."""
        return int8_matmul_grad(g, self.weight)


def measure(shape: Shape, repeats: int = REPEATS) -> dict[str, float]:
    """Milliseconds of forward and backward (∂x, ∂A, ∂B) of one adapted layer, medians, taken in turns.

    merged, added: the fused operation either way, of which the rule takes one. composed: torch's own operations and
    their derivatives, which the rule takes for small shapes. int8: the fused operation on 8-bit codes; dequantised: on the same codes made dense
    for each product, which is what an 8-bit weight falls back to.
    """
    tokens, columns_in, rows_out, rank = shape
    noise = torch.Generator().manual_seed(0)
    W, x, A, B = (
        torch.randn(*size, generator=noise)
        for size in ((rows_out, columns_in), (tokens, columns_in), (rank, columns_in), (rows_out, rank))
    )
    g = torch.randn(tokens, rows_out, generator=noise)
    inputs = [t.requires_grad_() for t in (x, A, B)]

    def fused(merge: bool, frozen: FrozenProduct | None = None) -> Tensor:
        plan, tensors = pack([Term(A, B, None, None, 2.0, 0.0, False, merge)])
        weight = W if frozen is None else None
        y: Tensor = AdaptedLinear.apply(Call(plan, merge, frozen), (), x, weight, None, *tensors)  # type: ignore[no-untyped-call]
        return y

    contenders: dict[str, Callable[[], Tensor]] = {
        "merged": lambda: fused(True),
        "added": lambda: fused(False),
        "composed": lambda: composed(x, W, None, [Term(A, B, None, None, 2.0, 0.0, False, False)]),
    }
    if int8_available():
        codes = quantize_int8(W)
        contenders["int8"] = lambda: fused(False, Narrow(codes))
        contenders["dequantised"] = lambda: fused(False, Dequantised(codes))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, forward in contenders.items():
            start = time.perf_counter()
            torch.autograd.grad(forward(), inputs, g)
            times[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(spent[1:]), 3) for name, spent in times.items()}
