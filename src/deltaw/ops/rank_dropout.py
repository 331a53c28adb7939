"""Dropout of a change itself rather than of activations: of single directions, or of all of it, for one call."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_ranks(rank: int, p: float, like: Tensor) -> Tensor:
    """Factors for the directions of a change, (rank,): 0 with probability p, else 1/(1-p).

    Drawn from torch's generator, in `like`'s dtype and on its device.
    """
    return (torch.rand(rank, device=like.device) >= p).to(like.dtype) / (1 - p)


def keep_all(p: float, like: Tensor) -> Tensor:
    """A factor for a whole change, (): 0 with probability p, else 1 (what is left does not grow)."""
    return (torch.rand((), device=like.device) >= p).to(like.dtype)
