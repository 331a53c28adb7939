"""The compiled operations of thin.c, on a processor with AVX2 or AVX-512: the thin products of an adapter with dropout made
in registers, and the codes of 8-bit products.

    shrink          h = drop(x) Aᵀ                       (T, k), (r, k) -> (T, r)     also u = g B, with Bᵀ as A
    expand_         y ← a c ⊙ y + shift + s drop(h Bᵀ)   (T, r), (T, n) -> (T, n)     in place, or written first; takes Bᵀ
    outer           s uᵀ drop(x)                         (T, r), (T, k) -> (r, k)     ∂A, and ∂Bᵀ = hᵀ g
    quantize_rows   codes of x ⊙ columns, and scales     (T, k) -> (T, k), (T, 1)

They read and write what torch's operations do, but once: a mask and the product with it are never in memory. The threads
are those of torch's own OpenMP, so that there is no second team. What goes where is decided by `takes`; without a C compiler at installation,
on other processors, or with DELTAW_COMPILED=0 nothing does, and torch's operations run (the twins, in steps.py and int8.py).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from deltaw.ops.dropout import TAPE, Mask, bit_tape
from deltaw.ops.matmul import PLAIN, readable

GRAIN = 1 << 15
"""Numbers that are worth a second thread."""

Address = ctypes.c_void_p
Count = ctypes.c_int64


class Job(ctypes.Structure):
    """As in thin.c; what a job does not name is zero."""

    _fields_ = (
        ("parallel", Address), ("thread", Address), ("size", Address), ("threads", Count),
        ("tape", Address), ("seed", ctypes.c_uint32), ("places", ctypes.c_uint32), ("height", Count), ("width", Count),
        ("scale", ctypes.c_float), ("rows", Count), ("columns", Count), ("rank", Count),
        ("wide", Address), ("stride", Count), ("thin", Address), ("factor", Address),
        ("rowscale", Address), ("gain", Address), ("shift", Address), ("first", Count), ("out", Address), ("codes", Address),
    )  # fmt: skip


LEVELS = {"AVX512": "avx512", "AVX2": "avx2"}


@functools.cache
def library() -> tuple[ctypes.CDLL, tuple[int, int, int]] | str:
    """The compiled operations, and the addresses of OpenMP's `parallel`, thread number and team size; or why there are none."""
    if os.environ.get("DELTAW_COMPILED") == "0":
        return "DELTAW_COMPILED is 0"
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability())
    if level is None:
        return "this processor has neither AVX2 nor AVX-512"
    found = importlib.util.find_spec(f"deltaw.ops.thin_{level}")
    if found is None or found.origin is None:
        return "they were not compiled when deltaw was installed (a C compiler on Linux, x86-64, makes them)"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = [torch_cpu.GOMP_parallel, torch_cpu.omp_get_thread_num, torch_cpu.omp_get_num_threads]
        loaded = ctypes.CDLL(found.origin)
    except (OSError, AttributeError) as error:
        return f"they cannot be loaded ({error})"
    for name in ("shrink", "expand", "outer", "quantize_rows"):
        operation = getattr(loaded, name)
        operation.argtypes, operation.restype = [ctypes.POINTER(Job)], None
    parallel, thread, size = (ctypes.cast(function, Address).value or 0 for function in team)
    return loaded, (parallel, thread, size)


def takes(*tensors: Tensor) -> bool:
    """Whether all of these are plain fp32 tensors on a CPU whose rows lie without gaps, and the compiled operations are there."""
    return (
        readable()
        and not isinstance(library(), str)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in PLAIN for t in tensors)
        and all(t.stride(-1) == 1 and t.numel() > 0 for t in tensors)
    )


def job(x: Tensor, mask: Mask | None = None, scale: float = 1.0) -> Job:
    """What is common to all: the shape of x (T, k), dropout, a factor, threads."""
    rows, columns = x.shape
    compiled = library()
    assert not isinstance(compiled, str), compiled
    work = Job(*compiled[1], torch.get_num_threads() if rows * columns > GRAIN else 1)
    work.rows, work.columns, work.stride, work.scale = rows, columns, x.stride(0), scale
    if mask is not None:
        work.tape, work.seed, work.places = bit_tape(mask.length, mask.p).data_ptr(), mask.first & 0xFFFFFFFF, TAPE
        work.height, work.width = mask.height, mask.columns
        work.scale = scale / (1.0 - mask.p) if mask.p < 1.0 else 0.0
    return work


def run(name: str, work: Job) -> None:
    """One operation of thin.c."""
    compiled = library()
    assert not isinstance(compiled, str), compiled
    getattr(compiled[0], name)(work)


def shrink(x: Tensor, A: Tensor, mask: Mask | None = None) -> Tensor:
    """h = drop(x) Aᵀ, (T, r), of x (T, k) and A (r, k)."""
    A = A.contiguous()
    h = x.new_empty(x.shape[0], A.shape[0])
    work = job(x, mask)
    work.rank, work.wide, work.factor, work.out = A.shape[0], x.data_ptr(), A.data_ptr(), h.data_ptr()
    run("shrink", work)
    return h


def expand_(
    y: Tensor,
    h: Tensor,
    Bt: Tensor,
    scale: float,
    *,
    mask: Mask | None = None,
    rowscale: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    first: bool = False,
) -> Tensor:
    """y ← rowscale ⊙ gain ⊙ y + shift + scale · drop(h Bt) in place, of y (T, n), h (T, r) and Bt (r, n).

    rowscale: (T, 1), one for each row. gain, shift: (n,). first: y holds nothing yet, and is not read.
    """
    Bt, h = Bt.contiguous(), h.contiguous()
    work = job(y, mask, scale)
    work.rank, work.thin, work.factor, work.out, work.first = h.shape[1], h.data_ptr(), Bt.data_ptr(), y.data_ptr(), first
    for name, tensor in (("rowscale", rowscale), ("gain", gain), ("shift", shift)):
        if tensor is not None:
            setattr(work, name, tensor.data_ptr())
    run("expand", work)
    return y


def outer(u: Tensor, x: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """scale · uᵀ drop(x), (r, k), of u (T, r) and x (T, k). The rows' sums depend on how many threads there are."""
    u = u.contiguous()
    work = job(x, mask, scale)
    out = x.new_empty(work.threads, u.shape[1], x.shape[1])  # a sum for each thread
    work.rank, work.thin, work.wide, work.out = u.shape[1], u.data_ptr(), x.data_ptr(), out.data_ptr()
    run("outer", work)
    return out[0].clone() if work.threads > 1 else out[0]


def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x ⊙ columns, (T, k), as codes around 128, uint8 (T, k), and one scale for each row, (T, 1); see int8.py."""
    codes, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], 1)
    work = job(x)
    work.wide, work.out, work.codes = x.data_ptr(), scales.data_ptr(), codes.data_ptr()
    if columns is not None:
        work.factor = columns.data_ptr()
    run("quantize_rows", work)
    return codes, scales
