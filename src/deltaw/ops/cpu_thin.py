"""Sweeps of thin.c: the thin products of an adapter, with dropout made in registers, on a processor with AVX2 or AVX-512.

    shrink          h = drop(x) Aᵀ                       (T, k), (r, k) -> (T, r)     also u = g B, with Bᵀ as A
    expand_         y ← a c ⊙ y + b + s drop(h Bᵀ)       (T, r), (r, n) -> (T, n)     in place, or written first; takes Bᵀ
    outer           s uᵀ drop(x)                         (T, r), (T, k) -> (r, k)     ∂A, and ∂Bᵀ = hᵀ g
    dots            Σ_t x ⊙ (y - b)                      (T, k), (T, k) -> (k,)       ∂gain
    squares         ‖w + s b A‖² of each row             (T,), (T, r), (T, r), (r, r) -> (T,)   dora.py
    make            x = c ⊙ f((z - m) ⊙ a ⊙ w) + b       (T, k) -> tiles of x         recompute.py
    quantize_rows   codes and scales of x ⊙ columns      (T, k) -> (T, k), (T, 1)     int8.py

A `Sweep` is told what is wanted and gives the tensors that will hold it; `run` fills them, all operations on a tile of rows
before the next tile is read. Everything is fp32. The threads are those of torch's own OpenMP, so that there is no second team.

`takes` decides. Without a C compiler at installation, on other processors, under a compiler or a tracer, or with
DELTAW_COMPILED=0 the plain twin of a sweep runs, steps.Plain.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deltaw.ops.compiled import addressable, library
from deltaw.ops.dropout import TAPE, Mask, bit_tape
from deltaw.ops.matmul import readable

if TYPE_CHECKING:
    from deltaw.ops.terms import Term

GRAIN = 1 << 15
"""Numbers that are worth a second thread."""

SHRINK, EXPAND, OUTER, DOTS, QUANTIZE, MAKE, SQUARES = range(7)
FUNCTIONS = {None: 0, "gelu": 1, "gelu tanh": 2, "silu": 3}

Address, Count, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Part(ctypes.Structure):
    """`Segment` of thin.c."""

    _fields_ = (("stop", Count), ("A", Address), ("B", Address), ("scale", Float))


class Job(ctypes.Structure):
    """One operation, as in thin.c; what is not named is zero, or absent."""

    _fields_ = (
        ("op", Count), ("columns", Count), ("rank", Count),
        ("tape", Address), ("seed", ctypes.c_uint32), ("places", ctypes.c_uint32), ("height", Count), ("width", Count),
        ("scale", Float), ("wide", Address), ("stride", Count), ("thin", Address), ("factor", Address), ("standing", Count), ("segments", Address),
        ("rowscale", Address), ("gain", Address), ("shift", Address), ("other", Address), ("other_stride", Count),
        ("first", Count), ("function", Count), ("head", Count), ("head_stride", Count),
        ("sample", Count), ("sample_stride", Count),
        ("out", Address), ("sum", Address), ("transposed", Count), ("codes", Address),
    )  # fmt: skip


class Jobs(ctypes.Structure):
    """`Sweep` of thin.c."""

    _fields_ = (
        ("parallel", Address), ("thread", Address), ("team", Address),
        ("threads", Count), ("rows", Count), ("count", Count), ("jobs", ctypes.POINTER(Job)),
        ("tile", Count), ("made", Count), ("sums", Count), ("each", Count), ("own", Address),
    )  # fmt: skip


class Made(NamedTuple):
    """x, (T, k), as a sweep can make it: gain ⊙ function((z - mean) ⊙ rstd ⊙ by) + shift; what is None is left out.

    z: (T, k), or (samples, heads, T / samples, k / heads), whose heads lie side by side in x. mean, rstd: one for each row.
    by: (T, k). gain, shift: (k,). function: one of `FUNCTIONS`.
    """

    z: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    by: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    function: str | None = None


class Segments:
    """The adapters of a batch, segment by segment: who the rows up to `stop` have, or None.

    parts: (stop, adapter) in turn, one adapter at least, all of one rank. The last of the stops is T.
    """

    def __init__(self, parts: Sequence[tuple[int, Term | None]]) -> None:
        self.held: list[Tensor] = []
        rows = []
        for stop, t in parts:
            if t is None:
                rows.append(Part(stop, 0, 0, 0.0))
                continue
            A, B = t.A.contiguous(), t.B.contiguous()
            rows.append(Part(stop, A.data_ptr(), B.data_ptr(), t.scale))
            self.held += [A, B]
        self.rank = self.held[0].shape[0]
        self.array = (Part * len(rows))(*rows)


class Tiles(NamedTuple):
    """x, (T, k), of which a sweep makes each tile when it comes to it. Only that sweep's operations can read it."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32


def takes(*rows: Tensor | Made | None, factors: Sequence[Tensor | None] = ()) -> bool:
    """Whether a sweep can run over `rows`, each (T, any) without gaps in a row, with these factors: all of them plain fp32
    tensors on a CPU, not empty."""
    if not readable() or isinstance(library(), str):
        return False
    for t in rows:
        if isinstance(t, Made):
            z, mean, rstd, by, gain, shift, _ = t
            if not takes(z, by, factors=(mean, rstd, gain, shift)):
                return False
        elif t is not None and (t.stride(-1) != 1 or not addressable(t)):
            return False
    return all(t is None or addressable(t) for t in factors)


class Sweep:
    """Operations over the same rows. What they return holds nothing before `run`."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.rows = self.columns = 0
        self.kept: list[Any] = []
        """What owns the memory that the jobs name."""

    def add(self, op: int, x: Tensor | Tiles, scale: float, mask: Mask | None, **fields: int) -> None:
        """One more job over the rows of x (T, k)."""
        self.rows, columns = x.shape
        self.columns += columns
        job = Job(op=op, columns=columns, scale=scale, **fields)
        if isinstance(x, Tensor):
            job.wide, job.stride = x.data_ptr(), x.stride(0)
            self.kept.append(x)
        if mask is not None:
            job.tape, job.seed, job.places = self.at(bit_tape(mask.length, mask.p)), mask.first & 0xFFFFFFFF, TAPE
            job.height, job.width = mask.height, mask.columns
            job.scale = scale / (1.0 - mask.p) if mask.p < 1.0 else 0.0
        self.jobs.append(job)

    def at(self, tensor: Tensor | None) -> int:
        """The address of a tensor's numbers, without gaps, kept for the run; 0 of None."""
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def factor(self, F: Tensor | Segments) -> dict[str, int]:
        """The fields of a job for A or Bᵀ, (r, k), of all rows or of each segment's."""
        self.kept.append(F)
        if isinstance(F, Segments):
            return {"rank": F.rank, "segments": ctypes.addressof(F.array)}
        standing = F.stride() == (1, F.shape[0]) and not F.is_contiguous()  # Bᵀ, where B lies without gaps
        return {"rank": F.shape[0], "factor": F.data_ptr() if standing else self.at(F), "standing": standing}

    def make(self, x: Made) -> Tiles:
        """x, for the operations that follow; one in a sweep."""
        z, mean, rstd, by, gain, shift, function = x
        if z.dim() == 2:
            tiles, shape = Tiles((z.shape[0], z.shape[1])), {"head": z.shape[1], "sample": z.shape[0]}
        else:
            samples, heads, each, width = z.shape
            tiles, shape = Tiles((samples * each, heads * width)), {"head": width, "sample": each}
            shape |= {"head_stride": z.stride(1), "sample_stride": z.stride(0)}
        small = {"thin": self.at(mean), "rowscale": self.at(rstd), "gain": self.at(gain), "shift": self.at(shift)}
        self.add(MAKE, tiles, 1.0, None, function=FUNCTIONS[function], **small, **shape)
        job = self.jobs[-1]
        job.wide, job.stride = z.data_ptr(), z.stride(-2)
        if by is not None:
            job.other, job.other_stride = by.data_ptr(), by.stride(0)
        self.kept += [z] if by is None else [z, by]
        return tiles

    def shrink(self, x: Tensor | Tiles, A: Tensor | Segments, mask: Mask | None = None) -> Tensor:
        """h = drop(x) Aᵀ, (T, r), of x (T, k) and A (r, k). By segments without dropout; rows that have none hold nothing."""
        factor = self.factor(A)
        h = torch.empty(x.shape[0], factor["rank"], dtype=torch.float32, device="cpu")
        self.add(SHRINK, x, 1.0, mask, out=self.at(h), **factor)
        return h

    def expand_(
        self,
        y: Tensor,
        h: Tensor,
        Bt: Tensor | Segments,
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

        rowscale: (T, 1), one for each row. gain, shift: (n,). source: what stands on the right in y's place, (T, n), where y
        holds nothing yet. first: y holds nothing yet, and nothing stands there. By segments nothing is dropped, and each has
        a scale of its own.
        """
        small = {"rowscale": self.at(rowscale), "gain": self.at(gain), "shift": self.at(shift), "out": y.data_ptr()}
        small |= {"thin": self.at(h), "first": first, "standing": isinstance(Bt, Segments)} | self.factor(Bt)
        if source is not None:
            self.kept.append(source)
            small |= {"other": source.data_ptr(), "other_stride": source.stride(0)}
        self.add(EXPAND, y, scale, mask, **small)
        return y

    def outer(
        self, u: Tensor, x: Tensor | Tiles, scale: float, mask: Mask | None = None, *, transposed: bool = False
    ) -> Tensor:
        """scale · uᵀ drop(x), (r, k) or transposed (k, r), of u (T, r) and x (T, k)."""
        rank, columns = u.shape[1], x.shape[1]
        out = u.new_empty((columns, rank) if transposed else (rank, columns))
        self.add(OUTER, x, scale, mask, rank=rank, thin=self.at(u), sum=self.at(out), transposed=transposed)
        return out

    def dots(self, x: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        """Σ_t x ⊙ (y - b), (k,), of x and y (T, k) and b (k,)."""
        out = x.new_empty(x.shape[1])
        self.kept.append(y)
        small = {"other": y.data_ptr(), "other_stride": y.stride(0), "shift": self.at(b), "sum": self.at(out)}
        self.add(DOTS, x, 1.0, None, **small)
        return out

    def quantize_rows(self, x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ⊙ columns, (T, k), as codes around 128, uint8 (T, k), and one scale for each row, (T, 1); see int8.py."""
        codes, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], 1)
        self.add(QUANTIZE, x, 1.0, None, codes=self.at(codes), out=self.at(scales), factor=self.at(columns))
        return codes, scales

    def squares(self, before: Tensor, h: Tensor, B: Tensor, gram: Tensor, scale: float) -> Tensor:
        """before + ⟨b, 2 scale h + scale² b gram⟩ of each row, at least 0, (T,), of before (T,), h and B (T, r), gram (r, r)."""
        out = h.new_empty(h.shape[0])
        small = {"rowscale": self.at(before), "thin": self.at(h), "other": self.at(B), "factor": self.at(gram)}
        self.add(SQUARES, h, scale, None, rank=h.shape[1], out=self.at(out), **small)
        return out

    def run(self) -> None:
        """All operations, in the order in which they were asked for."""
        if not self.jobs:
            return
        compiled = library()
        assert not isinstance(compiled, str), compiled
        count = len(self.jobs)
        threads = torch.get_num_threads() if self.rows * self.columns > GRAIN else 1
        jobs = Jobs(*compiled.team, threads, self.rows, count, (Job * count)(*self.jobs))
        if compiled.sweep(ctypes.byref(jobs)):
            raise MemoryError("no memory for the sums of a sweep")
        self.jobs.clear()
        self.kept.clear()
