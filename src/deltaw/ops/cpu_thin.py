"""Sweeps of thin.c: the thin products of an adapter, with dropout made in registers, on a processor with AVX2 or AVX-512.

    shrink          h = drop(x) Aᵀ                       (T, k), (r, k) -> (T, r)     also u = g B, with Bᵀ as A
    expand_         y ← a c ⊙ y + b + s drop(h Bᵀ)       (T, r), (r, n) -> (T, n)     in place, or written first; takes Bᵀ
    outer           s uᵀ drop(x)                         (T, r), (T, k) -> (r, k)     ∂A, and ∂Bᵀ = hᵀ g
    dots            Σ_t x ⊙ (y - b)                      (T, k), (T, k) -> (k,)       ∂gain
    quantize_rows   codes and scales of x ⊙ columns      (T, k) -> (T, k), (T, 1)     int8.py

A `Sweep` is told what is wanted and gives the tensors that will hold it; `run` fills them, all operations on a tile of rows
before the next tile is read. Everything is fp32. The threads are those of torch's own OpenMP, so that there is no second team.

`takes` decides. Without a C compiler at installation, on other processors, under a compiler or a tracer, or with
DELTAW_COMPILED=0 the plain twin of a sweep runs, steps.Plain.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.ops.dropout import TAPE, Mask, bit_tape
from deltaw.ops.matmul import PLAIN, readable

GRAIN = 1 << 15
"""Numbers that are worth a second thread."""

SHRINK, EXPAND, OUTER, DOTS, QUANTIZE = range(5)

Address, Count, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Job(ctypes.Structure):
    """One operation, as in thin.c; what is not named is zero, or absent."""

    _fields_ = (
        ("op", Count), ("columns", Count), ("rank", Count),
        ("tape", Address), ("seed", ctypes.c_uint32), ("places", ctypes.c_uint32), ("height", Count), ("width", Count),
        ("scale", Float), ("wide", Address), ("stride", Count), ("thin", Address), ("factor", Address),
        ("rowscale", Address), ("gain", Address), ("shift", Address), ("other", Address), ("other_stride", Count),
        ("first", Count), ("out", Address), ("sum", Address), ("transposed", Count), ("codes", Address),
    )  # fmt: skip


class Jobs(ctypes.Structure):
    """`Sweep` of thin.c."""

    _fields_ = (
        ("parallel", Address), ("thread", Address), ("team", Address),
        ("threads", Count), ("rows", Count), ("count", Count), ("jobs", ctypes.POINTER(Job)),
    )  # fmt: skip


LEVELS = {"AVX512": "avx512", "AVX2": "avx2"}


@functools.cache
def library() -> tuple[Any, tuple[int, int, int]] | str:
    """The compiled `sweep`, and the addresses of OpenMP's `parallel`, thread number and team size; or why there are none."""
    if os.environ.get("DELTAW_COMPILED") == "0":
        return "DELTAW_COMPILED is 0"
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability())
    if level is None:
        return "this processor has neither AVX2 nor AVX-512"
    found = importlib.util.find_spec(f"deltaw.ops.thin_{level}")
    if found is None or found.origin is None:
        return "deltaw was installed without a C compiler, or not on Linux (x86-64)"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = [torch_cpu.GOMP_parallel, torch_cpu.omp_get_thread_num, torch_cpu.omp_get_num_threads]
        sweep = ctypes.CDLL(found.origin).sweep
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded: {error}"
    sweep.argtypes, sweep.restype = [ctypes.POINTER(Jobs)], None
    parallel, thread, size = (ctypes.cast(function, Address).value or 0 for function in team)
    return sweep, (parallel, thread, size)


def level() -> str:
    """What sweeps run on here, in a word; bits depend on it."""
    return "torch" if isinstance(library(), str) else LEVELS[torch.backends.cpu.get_cpu_capability()]


def takes(*rows: Tensor | None, factors: Sequence[Tensor | None] = ()) -> bool:
    """Whether a sweep can run over `rows`, each (T, any) without gaps in a row, with these factors: all of them plain fp32
    tensors on a CPU, not empty."""
    if not readable() or isinstance(library(), str):
        return False
    for t in rows:
        if t is not None and (t.stride(-1) != 1 or not is_plain(t)):
            return False
    return all(t is None or is_plain(t) for t in factors)


def is_plain(t: Tensor) -> bool:
    """Whether these are numbers of 32 bit that lie in memory as they are, one at least (empty or freed memory has no address)."""
    return t.dtype == torch.float32 and type(t) in PLAIN and t.is_cpu and t.data_ptr() != 0 and not t.is_neg()


class Sweep:
    """Operations over the same rows. What they return holds nothing before `run`."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.rows = 0
        self.threads = torch.get_num_threads()
        self.kept: list[Tensor] = []
        """Tensors whose memory the jobs name."""

    def add(self, op: int, x: Tensor, scale: float, mask: Mask | None, fields: dict[str, int]) -> None:
        """One more job over the rows of x (T, k)."""
        job = Job(op=op, columns=x.shape[1], wide=x.data_ptr(), stride=x.stride(0), scale=scale, **fields)
        if mask is not None:
            job.tape, job.seed, job.places = self.at(bit_tape(mask.length, mask.p)), mask.first & 0xFFFFFFFF, TAPE
            job.height, job.width = mask.height, mask.columns
            job.scale = scale / (1.0 - mask.p) if mask.p < 1.0 else 0.0
        self.rows = x.shape[0]
        self.kept.append(x)
        self.jobs.append(job)

    def at(self, tensor: Tensor | None) -> int:
        """The address of a tensor's numbers, without gaps, kept for the run; 0 of None."""
        if tensor is None:
            return 0
        self.kept.append(tensor.contiguous())
        return self.kept[-1].data_ptr()

    def shrink(self, x: Tensor, A: Tensor, mask: Mask | None = None) -> Tensor:
        """h = drop(x) Aᵀ, (T, r), of x (T, k) and A (r, k)."""
        h = x.new_empty(x.shape[0], A.shape[0])
        self.add(SHRINK, x, 1.0, mask, {"rank": A.shape[0], "factor": self.at(A), "out": self.at(h)})
        return h

    def expand_(
        self,
        y: Tensor,
        h: Tensor,
        Bt: Tensor,
        scale: float,
        mask: Mask | None = None,
        *,
        rowscale: Tensor | None = None,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        source: Tensor | None = None,
        first: bool = False,
    ) -> Tensor:
        """y ← rowscale ⊙ gain ⊙ y + shift + scale · drop(h Bt) in place, of y (T, n), h (T, r) and Bt (r, n).

        rowscale: (T, 1), one for each row. gain, shift: (n,). source: what stands on the right in y's place, (T, n), if y holds
        nothing yet. first: y holds nothing yet, and nothing stands there.
        """
        memory = {"rowscale": self.at(rowscale), "gain": self.at(gain), "shift": self.at(shift), "out": y.data_ptr()}
        memory |= {"rank": h.shape[1], "thin": self.at(h), "factor": self.at(Bt), "first": first}
        if source is not None:
            self.kept.append(source)
            memory |= {"other": source.data_ptr(), "other_stride": source.stride(0)}
        self.add(EXPAND, y, scale, mask, memory)
        return y

    def outer(
        self, u: Tensor, x: Tensor, scale: float, mask: Mask | None = None, *, transposed: bool = False
    ) -> Tensor:
        """scale · uᵀ drop(x), (r, k) or transposed (k, r), of u (T, r) and x (T, k)."""
        rank, columns = u.shape[1], x.shape[1]
        out = x.new_empty((columns, rank) if transposed else (rank, columns))
        sums = x.new_empty(self.threads, rank, columns)
        memory = {"thin": self.at(u), "out": self.at(sums), "sum": self.at(out)}
        self.add(OUTER, x, scale, mask, {**memory, "rank": rank, "transposed": transposed})
        return out

    def dots(self, x: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        """Σ_t x ⊙ (y - b), (k,), of x and y (T, k) and b (k,)."""
        out, sums = x.new_empty(x.shape[1]), x.new_empty(self.threads, x.shape[1])
        self.kept.append(y)
        memory = {"other": y.data_ptr(), "out": self.at(sums), "sum": self.at(out)}
        self.add(DOTS, x, 1.0, None, {**memory, "shift": self.at(b), "other_stride": y.stride(0)})
        return out

    def quantize_rows(self, x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ⊙ columns, (T, k), as codes around 128, uint8 (T, k), and one scale for each row, (T, 1); see int8.py."""
        codes, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], 1)
        memory = {"codes": self.at(codes), "out": self.at(scales), "factor": self.at(columns)}
        self.add(QUANTIZE, x, 1.0, None, memory)
        return codes, scales

    def run(self) -> None:
        """All operations, in the order in which they were asked for."""
        if not self.jobs:
            return
        compiled = library()
        assert not isinstance(compiled, str), compiled
        sweep, team = compiled
        threads = self.threads if self.rows * sum(job.columns for job in self.jobs) > GRAIN else 1
        sweep(Jobs(*team, threads, self.rows, len(self.jobs), (Job * len(self.jobs))(*self.jobs)))
        self.jobs.clear()
        self.kept.clear()
