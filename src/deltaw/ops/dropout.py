"""Seeded dropout: the mask is a function of (seed, row, column), so that nothing is stored and backward makes it again.

Row i of the mask is a window, starting at a hashed offset, of one hashed tape of keep/drop decisions:

    mask[i, j] = tape[offset(i) + j]        tape[k] = (hash(seed + k) >= p) / (1 - p)
    offset(i)  = hash(seed + END - i) mod TAPE

On a CPU a window is a memory copy, which is why this is nearly free where one random number per entry costs more than
the product that follows; on a GPU the same formula is evaluated in registers. Entries of one row are independent; two
rows are independent too, unless their windows overlap: then they are shifted copies of each other, equal ones for one
pair of rows in TAPE. The seed comes from torch's generator, so checkpointing, resuming and `torch.manual_seed` work as
with any dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAPE = 1 << 14
"""Number of window starts. A power of two: an offset is the low bits of a hash."""

END = 2**31 - 1
"""The tape is hashed upwards from the seed, the offsets downwards from here, so that they share no input."""


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of `device`: an int32 tensor (), never read back to the host."""
    return torch.randint(-(2**31), 2**31 - 1, (), dtype=torch.int32, device=device)


def mix_(k: Tensor) -> Tensor:
    """A 32-bit hash of each entry of an int32 tensor, in place (multiply and xor-shift; arithmetic wraps around)."""
    k.bitwise_xor_((k >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    k.bitwise_xor_((k >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    return k.bitwise_xor_((k >> 15).bitwise_and_(0x1FFFF))


def tape(seed: Tensor, length: int, p: float, dtype: torch.dtype) -> Tensor:
    """The first `length` keep/drop decisions of `seed`: 1 / (1 - p) with probability 1 - p, else 0. (length,)."""
    if p >= 1.0:
        return torch.zeros(length, dtype=dtype, device=seed.device)
    uniform = mix_(torch.arange(length, dtype=torch.int32, device=seed.device).add_(seed))  # in [-2^31, 2^31)
    return (uniform >= int(p * 2**32) - 2**31).to(dtype).mul_(1.0 / (1.0 - p))


def offsets(seed: Tensor, rows: int) -> Tensor:
    """The window start of each row, in [0, TAPE). (rows,)."""
    k = torch.arange(END, END - rows, -1, dtype=torch.int32, device=seed.device).add_(seed)
    return mix_(k).bitwise_and_(TAPE - 1)


class Mask:
    """The dropout mask of `seed`, (rows, columns): 1 / (1 - p) where kept, 0 where dropped; made a few rows at a time."""

    def __init__(self, seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> None:
        self.windows = tape(seed, TAPE + columns - 1, p, dtype).as_strided((TAPE, columns), (1, 1))
        self.starts = offsets(seed, rows)

    def rows(self, part: slice) -> Tensor:
        """Those rows of the mask, a fresh tensor."""
        return self.windows.index_select(0, self.starts[part])


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """The whole mask, (rows, columns)."""
    return Mask(seed, rows, columns, p, dtype).rows(slice(None))


def keep_mask_reference(seed: int, rows: int, columns: int, p: float) -> list[list[float]]:
    """The same mask by the formula of the header, entry by entry, in Python's integers."""

    def hashed(k: int) -> int:
        k &= 0xFFFFFFFF
        k = ((k ^ (k >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        k = ((k ^ (k >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return k ^ (k >> 15)

    def kept(k: int) -> bool:
        signed = (hashed(seed + k) ^ 0x80000000) - 0x80000000  # the hash read as a signed number
        return signed >= int(p * 2**32) - 2**31

    starts = [hashed(seed + END - i) % TAPE for i in range(rows)]
    return [[float(kept(start + j)) / (1.0 - p) if p < 1.0 else 0.0 for j in range(columns)] for start in starts]
