"""Seeded dropout: the mask is a function of (seed, row, column), so that nothing is stored and backward makes it again.

Row i of the mask is a window, starting at a hashed offset, of one hashed tape of keep/drop decisions:

    mask[i, j] = tape[offset(seed, i) + j],    tape[k] = (hash(seed, k) >= p) / (1 - p)

A window is a memory copy, which is why this is nearly free on a CPU where one random number per entry costs more than
the product that follows; on a GPU the same formula is evaluated in registers. Entries of one row are independent, two
rows are either independent or (rarely) shifted copies of each other. The seed is drawn from torch's generator, so
checkpointing, resuming and `torch.manual_seed` work as with any dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAPE = 1 << 15
"""Number of window starts. A power of two: an offset is the low bits of a hash."""


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of `device`: an int32 tensor (), never read back to the host."""
    return torch.randint(-(2**31), 2**31 - 1, (), dtype=torch.int32, device=device)


def mix(k: Tensor) -> Tensor:
    """A 32-bit hash of each entry of an int32 tensor (multiply, xor-shift; arithmetic wraps around)."""
    k = k ^ ((k >> 16) & 0xFFFF)
    k = k * 0x21F0AAAD
    k = k ^ ((k >> 15) & 0x1FFFF)
    k = k * 0x735A2D97
    return k ^ ((k >> 15) & 0x1FFFF)


def tape(seed: Tensor, length: int, p: float, dtype: torch.dtype) -> Tensor:
    """The first `length` keep/drop decisions of `seed`: 1 / (1 - p) with probability 1 - p, else 0. (length,)."""
    k = torch.arange(length, dtype=torch.int32, device=seed.device)
    uniform = mix(mix(k + seed) ^ seed) & 0x7FFFFFFF
    kept = uniform >= round(p * 2**31)
    return kept.to(dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def offsets(seed: Tensor, rows: int) -> Tensor:
    """The window start of each row, in [0, TAPE). (rows,)."""
    i = torch.arange(rows, dtype=torch.int32, device=seed.device)
    return mix(mix(~i + seed) ^ ~seed) & (TAPE - 1)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """The dropout mask of `seed`, (rows, columns): 1 / (1 - p) where kept, 0 where dropped. A fresh tensor."""
    windows = tape(seed, TAPE + columns - 1, p, dtype).as_strided((TAPE, columns), (1, 1))
    return windows.index_select(0, offsets(seed, rows))
