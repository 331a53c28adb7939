"""Seeded dropout: the mask is a function of (seed, row, column), so that nothing is stored and backward makes it again.

There is one tape of keep/drop decisions per probability p. A mask is cut from it in blocks of R rows, each a window of
the tape at a hashed place:

    mask[i, j] = tape[start(i // R) + (i mod R) columns + j]        R = max(1, BLOCK // columns)
    tape[k]    = (hash(k) >= p) / (1 - p)                           start(b) = hash(seed + b) mod TAPE

On a CPU a block of the mask is a view of the tape: nothing is drawn, hashed or copied, where one random number per entry
costs more than the product that follows. Entries of one block are independent. A full block covers twice as much of the
tape as there are starts, so that any two of them, of one call or of two, of whatever layers, hold some of the same
decisions, shifted against each other: at the same (i, j) they have different places of the tape, but for one pair of
blocks in TAPE, which is equal. The seed comes from torch's generator, so checkpointing, resuming and
`torch.manual_seed` work as with any dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TAPE = 1 << 18
"""Number of places a window can start at. A power of two: a start is the low bits of a hash."""

BLOCK = 1 << 19
"""Numbers per block: a block of x stays near the CPU through the passes over it, and is worth a call of each."""


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of `device`: an int32 tensor (), read back to the host on a CPU only."""
    return torch.randint(-(2**31), 2**31 - 1, (), dtype=torch.int32, device=device)


def rows_per_block(columns: int) -> int:
    """R of the header."""
    return max(1, BLOCK // max(1, columns))


def hashed(k: int) -> int:
    """A 32-bit hash of k modulo 2^32, in [0, 2^32) (multiply and xor-shift)."""
    k &= 0xFFFFFFFF
    k = ((k ^ (k >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    k = ((k ^ (k >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return k ^ (k >> 15)


def mix_(k: Tensor) -> Tensor:
    """`hashed` of each entry of an int32 tensor, in place; the result read as signed numbers."""
    k.bitwise_xor_((k >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    k.bitwise_xor_((k >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    return k.bitwise_xor_((k >> 15).bitwise_and_(0x1FFFF))


def decisions(k: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """tape[k] for an int32 tensor k, which is overwritten: 1 / (1 - p) with probability 1 - p, else 0."""
    if p >= 1.0:
        return torch.zeros(k.shape, dtype=dtype, device=k.device)
    return (mix_(k) >= int(p * 2**32) - 2**31).to(dtype).mul_(1.0 / (1.0 - p))


@functools.lru_cache(maxsize=8)
def tape(length: int, p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The first `length` decisions of the tape of p, (length,). Made once; never to be written to."""
    with torch.inference_mode(False), torch.no_grad():
        return decisions(torch.arange(length, dtype=torch.int32, device=device), p, dtype)


@functools.lru_cache(maxsize=8)
def bit_tape(length: int, p: float) -> Tensor:
    """`tape` as bits, eight to a byte with the first one lowest, and some bytes more: thin.c reads four at a time."""
    with torch.inference_mode(False), torch.no_grad():
        kept = tape(length, p, torch.float32, torch.device("cpu")) != 0
        weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
        bytes_ = (F.pad(kept, (0, -length % 8)).view(-1, 8) * weights).sum(1, dtype=torch.uint8)
        return F.pad(bytes_, (0, 8))


class Mask:
    """The dropout mask of `seed`, (rows, columns): 1 / (1 - p) where kept, 0 where dropped; made a few rows at a time."""

    def __init__(self, seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> None:
        self.seed, self.count, self.columns, self.p, self.dtype = seed, rows, columns, p, dtype
        self.height = rows_per_block(columns)
        self.compiling = torch.compiler.is_compiling()
        self.viewed = seed.device.type == "cpu" and not self.compiling
        self.first = int(seed) if self.viewed else 0

    @property
    def length(self) -> int:
        """All that a window can cover: one tape for all widths up to `BLOCK`."""
        return TAPE + max(BLOCK, self.columns)

    def tape(self) -> Tensor:
        """The decisions that the windows are cut from."""
        return tape(self.length, self.p, self.dtype, self.seed.device)

    def rows(self, part: slice) -> Tensor:
        """Those rows of the mask, not to be written to: on a CPU, inside one block, a view of the tape."""
        start, stop, _ = part.indices(self.count)
        block, offset = divmod(start, self.height)
        if self.viewed and stop <= (block + 1) * self.height:
            place = hashed(self.first + block) % TAPE + offset * self.columns
            return self.tape().as_strided((stop - start, self.columns), (self.columns, 1), place)
        rows = torch.arange(start, stop, dtype=torch.int32, device=self.seed.device)
        blocks = rows.div(self.height, rounding_mode="floor")
        places = mix_(blocks + self.seed).bitwise_and_(TAPE - 1) + (rows - blocks * self.height) * self.columns
        if self.compiling:  # no tape: the compiler evaluates the formula where the mask is used
            columns = torch.arange(self.columns, dtype=torch.int32, device=rows.device)
            return decisions(places[:, None] + columns, self.p, self.dtype)
        windows = self.tape().as_strided((TAPE + (self.height - 1) * self.columns, self.columns), (1, 1))
        return windows.index_select(0, places)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """The whole mask, (rows, columns), not to be written to."""
    return Mask(seed, rows, columns, p, dtype).rows(slice(None))


def keep_mask_reference(
    seed: int, rows: int, columns: int, p: float, some: Sequence[int] | None = None
) -> list[list[float]]:
    """The same mask (or `some` of its columns) by the formula of the header, entry by entry, in Python's integers."""

    def entry(k: int) -> float:
        signed = (hashed(k) ^ 0x80000000) - 0x80000000  # the hash read as a signed number
        return 1.0 / (1.0 - p) if p < 1.0 and signed >= int(p * 2**32) - 2**31 else 0.0

    height = rows_per_block(columns)
    starts = [hashed(seed + i // height) % TAPE + (i % height) * columns for i in range(rows)]
    return [[entry(start + j) for j in (range(columns) if some is None else some)] for start in starts]
