"""Products of 32-bit matrices on a CPU, by the faster of torch's two libraries.

`x @ Wᵀ` goes to MKL in torch, and MKL takes its fast kernels on Intel's processors only: on others with AVX-512 it runs
at less than half of what oneDNN, which torch carries as well, does with the same numbers in the same precision. So
there, products that are large enough to pay for oneDNN's longer call go to oneDNN.

Both compute in 32 bit; they sum in different orders, so their results differ by roundings.
The choice depends on the processor, the precision and the shape alone, never on a measurement: a run that is resumed on
the same machine takes the same kernels. `torch.backends.mkldnn.flags(enabled=False)` forbids it. Under a compiler or
`torch.jit.trace`, on tensor subclasses and in every other precision it is `F.linear`, the plain twin.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import functional as F

WORTH = 1 << 19
"""Multiplications below which oneDNN's longer call costs more than its kernel gains."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (T, in), W (out, in) in any memory order, b (out,): a fresh (T, out). Not differentiable.

    The other products are the same one: a b = linear(a, bᵀ), aᵀ b = linear(aᵀ, bᵀ).
    """
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def thin(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ, (T, r), for x (T, k) and A (r, k) with few rows r; in memory (T, r) or, where that is the faster one, (r, T).

    The libraries differ: MKL on Intel's processors takes half the time with the short side last, oneDNN with it first.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not mkl_is_slow():
        return F.linear(x, A)
    return linear(A, x).t()


def joined(parts: list[Tensor]) -> Tensor:
    """(T, r) from what `thin` gave for its blocks of rows, at least one; in memory as these."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts[0].is_contiguous() else torch.cat([h.t() for h in parts], dim=1).t()


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes oneDNN for this product: it can, and on this machine it is the faster one."""
    return (
        not torch.compiler.is_compiling()  # asked first: a comparison of symbolic sizes would be a guard
        and mkl_is_slow()
        and x.shape[0] * weight.numel() >= WORTH
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and bool(torch.backends.mkldnn.enabled)
        and not torch._C._is_tracing()  # TorchScript cannot write the operation down
    )


def adds_in_place(x: Tensor, weight: Tensor) -> bool:
    """Whether `y.addmm_(x, weight)` takes no longer than the product alone, and no sum is rounded to 16 bit on its way.

    So it is with MKL. oneDNN has such a sum, but torch gives no way to it.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and MKL
        and not mkl_is_slow()
    )


def transformed() -> bool:
    """Whether `torch.func`, forward-mode differentiation or `torch.jit.trace` is at work, which need plain operations."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._is_tracing():
        return True
    stack = _functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    return stack is not None or forward_ad._current_level >= 0


def readable() -> bool:
    """Whether numbers can be looked at to choose a kernel: not under a compiler, `transformed`, or a mode that traces or counts."""
    return not (torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack())


def library(tokens: int, rows_out: int, columns_in: int) -> str:
    """The library that multiplies plain fp32 tensors x (tokens, in) and W (out, in) here, outside a compiler, and why."""
    if not mkl_is_slow():
        return "MKL (torch's own choice): this processor is Intel's or has no AVX-512, or torch has one library only"
    if not torch.backends.mkldnn.enabled:
        return "MKL: oneDNN is switched off"
    work = tokens * rows_out * columns_in
    if work < WORTH:
        return f"MKL: {work:,} multiplications do not pay for oneDNN's longer call ({WORTH:,} would)"
    return "oneDNN: MKL is slow on this processor (AVX-512, not Intel's)"


PLAIN = (Tensor, torch.nn.Parameter)
MKL = bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor with AVX-512 that is not Intel's, and oneDNN is there instead."""
    return (
        MKL
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "intel" not in processor().lower()
    )


def processor() -> str:
    """Who made the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")
