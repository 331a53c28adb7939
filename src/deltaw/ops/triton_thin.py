# mypy: disable-error-code="untyped-decorator"
"""Triton kernels for the three thin products of an adapter, dropout made in registers, for one adapter or a sorted batch.

    shrink     h = drop(x) Aᵀ                           (T, in)  -> (T, r)     also u = g B, with B as Aᵀ
    expand_    y ← c ⊙ y + shift + s drop(h Bᵀ)         (T, r)   -> (T, out)   in place, y read and written once; takes Bᵀ
    outer      ∂A = uᵀ drop(x)                          (T, r), (T, in) -> (r, in)   also ∂Bᵀ = hᵀ g

`drop` is the mask of dropout.py, entry by entry from the formula: no mask is ever in memory. In `shrink` and `expand_`
the adapters may be stacked, (G, r, side), and a table of tiles says which rows belong to which (`tiles_of`); rows in no
tile are not touched. The plain twins are the functions of the same names with `_reference`.

Imported only where Triton is installed. On a CPU they run under Triton's interpreter (TRITON_INTERPRET=1), which is how
they are tested; `benchmarks/gpu.py` checks and times them on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from deltaw.ops.dropout import TAPE, keep_mask, rows_per_block

ROWS = 32
"""Rows per tile."""
SIDE = 64
"""Columns of the long side per step."""


@triton.jit
def hashed(k):  # type: ignore[no-untyped-def]
    """dropout.mix_ on uint32."""
    k = (k ^ (k >> 16)) * 0x21F0AAAD
    k = (k ^ (k >> 15)) * 0x735A2D97
    return k ^ (k >> 15)


@triton.jit
def keep(seed, rows, columns, width, height, threshold, TAPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the entries (rows, columns) of a mask `width` wide are kept, in blocks of `height` rows; see dropout.py.

    seed and threshold are uint32.
    """
    start = hashed(seed + (rows // height).to(tl.uint32)) % TAPE + ((rows % height) * width).to(tl.uint32)
    bits = hashed(start[:, None] + columns.to(tl.uint32)[None, :])
    return (bits ^ 0x80000000) >= threshold  # the signed order, as an unsigned one


@triton.jit
def tile_of(tiles, rows_total, GROUPED: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row, end, and adapter of this program."""
    pid = tl.program_id(0)
    if GROUPED:
        return tl.load(tiles + 3 * pid), tl.load(tiles + 3 * pid + 1), tl.load(tiles + 3 * pid + 2)
    return pid * ROWS, rows_total, 0


@triton.jit
def shrink_kernel(  # type: ignore[no-untyped-def]
    x, A, h, tiles, seed, T, K, R, xs, height, threshold, inverse,
    GROUPED: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr, RANK: tl.constexpr,
    TAPE: tl.constexpr,
):  # fmt: skip
    """One tile of h (T, R) from x (T, K) and A (G, R, K)."""
    first, stop, adapter = tile_of(tiles, T, GROUPED, ROWS)
    rows = first + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    A += adapter * R * K
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for k in range(0, K, SIDE):
        columns = k + tl.arange(0, SIDE)
        inside = (rows < stop)[:, None] & (columns < K)[None, :]
        part = tl.load(x + rows[:, None] * xs + columns[None, :], mask=inside, other=0.0)
        if DROP:
            kept = keep(tl.load(seed).to(tl.uint32), rows, columns, K, height, threshold, TAPE)
            part = tl.where(kept, part * inverse, 0.0).to(part.dtype)
        narrow = tl.load(
            A + ranks[:, None] * K + columns[None, :], mask=(ranks < R)[:, None] & (columns < K)[None, :], other=0.0
        )
        total += tl.dot(part, tl.trans(narrow.to(part.dtype)), input_precision="ieee")
    tl.store(h + rows[:, None] * R + ranks[None, :], total, mask=(rows < stop)[:, None] & (ranks < R)[None, :])


@triton.jit
def expand_kernel(  # type: ignore[no-untyped-def]
    y, h, Bt, gain, shift, tiles, seed, T, N, R, scale, height, threshold, inverse,
    GROUPED: tl.constexpr, DROP: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, SIDE: tl.constexpr, RANK: tl.constexpr, TAPE: tl.constexpr,
):  # fmt: skip
    """One tile of y (T, N) from h (T, R) and Bt (G, R, N)."""
    first, stop, adapter = tile_of(tiles, T, GROUPED, ROWS)
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    ranks = tl.arange(0, RANK)
    inside = (rows < stop)[:, None] & (columns < N)[None, :]
    thin = tl.load(
        h + rows[:, None] * R + ranks[None, :], mask=(rows < stop)[:, None] & (ranks < R)[None, :], other=0.0
    )
    wide = tl.load(
        Bt + adapter * R * N + ranks[:, None] * N + columns[None, :],
        mask=(ranks < R)[:, None] & (columns < N)[None, :],
        other=0.0,
    )
    change = tl.dot(thin, wide.to(thin.dtype), input_precision="ieee") * scale
    if DROP:
        kept = keep(tl.load(seed).to(tl.uint32), rows, columns, N, height, threshold, TAPE)
        change = tl.where(kept, change * inverse, 0.0)
    place = y + rows[:, None] * N + columns[None, :]
    base = tl.load(place, mask=inside, other=0.0)
    value = base.to(tl.float32)
    if GAIN:
        value = value * (1.0 + tl.load(gain + columns, mask=columns < N, other=0.0).to(tl.float32))[None, :]
    if SHIFT:
        value = value + tl.load(shift + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(place, (value + change).to(base.dtype), mask=inside)


@triton.jit
def outer_kernel(  # type: ignore[no-untyped-def]
    u, x, out, seed, T, K, R, xs, height, threshold, inverse,
    DROP: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr, RANK: tl.constexpr,
    TAPE: tl.constexpr,
):  # fmt: skip
    """One strip of columns of out (R, K) from u (T, R) and x (T, K); the rows in order, so that runs are repeatable."""
    columns = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((RANK, SIDE), dtype=tl.float32)
    for first in range(0, T, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < T)[:, None] & (columns < K)[None, :]
        part = tl.load(x + rows[:, None] * xs + columns[None, :], mask=inside, other=0.0)
        if DROP:
            kept = keep(tl.load(seed).to(tl.uint32), rows, columns, K, height, threshold, TAPE)
            part = tl.where(kept, part * inverse, 0.0).to(part.dtype)
        thin = tl.load(
            u + rows[:, None] * R + ranks[None, :], mask=(rows < T)[:, None] & (ranks < R)[None, :], other=0.0
        )
        total += tl.dot(tl.trans(thin).to(part.dtype), part, input_precision="ieee")
    tl.store(out + ranks[:, None] * K + columns[None, :], total, mask=(ranks < R)[:, None] & (columns < K)[None, :])


def tiles_of(segments: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """(first row, end, adapter) of every tile of the segments (start, stop, adapter): int32 (tiles, 3). Once per batch."""
    found = [(row, stop, adapter) for start, stop, adapter in segments for row in range(start, stop, ROWS)]
    return torch.tensor(found, dtype=torch.int32, device=device).view(-1, 3)


def shrink(x: Tensor, A: Tensor, *, seed: Tensor | None = None, p: float = 0.0, tiles: Tensor | None = None) -> Tensor:
    """h = drop(x) Aᵀ, fp32 (T, r), of x (T, in) and A (r, in); with `tiles`, A is (G, r, in)."""
    x = unit(x)
    rows, width = x.shape
    rank = A.shape[-2]
    h = torch.zeros(rows, rank, dtype=torch.float32, device=x.device)
    count = triton.cdiv(rows, ROWS) if tiles is None else tiles.shape[0]
    if count and h.numel():
        shrink_kernel[(count,)](
            x, A.contiguous(), h, h if tiles is None else tiles, h if seed is None else seed,
            rows, width, rank, x.stride(0), *dropping(width, p),
            GROUPED=tiles is not None, DROP=seed is not None, ROWS=ROWS, SIDE=SIDE, RANK=padded(rank), TAPE=TAPE,
        )  # fmt: skip
    return h


def expand_(
    y: Tensor,
    h: Tensor,
    Bt: Tensor,
    scale: float,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    tiles: Tensor | None = None,
) -> Tensor:
    """y ← (1 + gain) ⊙ y + shift + s drop(h Bt), in place, of y (T, out), h (T, r), Bt (r, out); with `tiles` (G, r, out)."""
    rows, width = y.shape
    rank = h.shape[1]
    count = triton.cdiv(rows, ROWS) if tiles is None else tiles.shape[0]
    if count and y.numel():
        expand_kernel[(count, triton.cdiv(width, SIDE))](
            y, h.contiguous(), Bt.contiguous(), y if gain is None else gain, y if shift is None else shift,
            h if tiles is None else tiles, h if seed is None else seed, rows, width, rank, scale, *dropping(width, p),
            GROUPED=tiles is not None, DROP=seed is not None, GAIN=gain is not None, SHIFT=shift is not None,
            ROWS=ROWS, SIDE=SIDE, RANK=padded(rank), TAPE=TAPE,
        )  # fmt: skip
    return y


def outer(u: Tensor, x: Tensor, *, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """uᵀ drop(x), fp32 (r, in), of u (T, r) and x (T, in)."""
    x = unit(x)
    (rows, rank), width = u.shape, x.shape[1]
    out = torch.zeros(rank, width, dtype=torch.float32, device=x.device)
    if rows and out.numel():
        outer_kernel[(triton.cdiv(width, SIDE),)](
            u.contiguous(), x, out, out if seed is None else seed, rows, width, rank, x.stride(0),
            *dropping(width, p), DROP=seed is not None, ROWS=ROWS, SIDE=SIDE, RANK=padded(rank), TAPE=TAPE,
        )  # fmt: skip
    return out


def shrink_reference(x: Tensor, A: Tensor, *, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """`shrink` of one adapter in plain PyTorch."""
    return dropped(x.float(), seed, p) @ A.float().t()


def expand_reference(
    y: Tensor,
    h: Tensor,
    Bt: Tensor,
    scale: float,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """`expand_` of one adapter in plain PyTorch, as a fresh tensor."""
    value = y.float() if gain is None else y.float() * (1 + gain.float())
    value = value if shift is None else value + shift.float()
    return (value + dropped(scale * (h @ Bt.float()), seed, p)).to(y.dtype)


def outer_reference(u: Tensor, x: Tensor, *, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """`outer` in plain PyTorch."""
    return u.float().t() @ dropped(x.float(), seed, p)


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x (T, k) with the mask of `seed`."""
    return x if seed is None else x * keep_mask(seed, x.shape[0], x.shape[1], p, x.dtype)


def dropping(width: int, p: float) -> tuple[int, int, float]:
    """Rows per block of a mask so wide, the threshold that a hash must reach to be kept (uint32), and 1 / (1 - p)."""
    return rows_per_block(width), *((int(p * 2**32), 1.0 / (1.0 - p)) if p < 1.0 else (2**32 - 1, 0.0))


def padded(rank: int) -> int:
    """The rank as a tile's side: a power of two that tensor cores take."""
    return max(16, int(triton.next_power_of_2(rank)))


def unit(x: Tensor) -> Tensor:
    """x with its columns side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
