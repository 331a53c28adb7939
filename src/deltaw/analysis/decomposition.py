"""A base weight beside its singular directions, decomposed once however many adapters and measures look at it."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.ops.truncated_svd import EXACT_UP_TO, top_singular

Triplets = tuple[Tensor, Tensor, Tensor]


class Decomposition:
    """`W` (out, in) in float64, and as much of its SVD as was asked for.

    Up to a smaller side of `EXACT_UP_TO` the SVD is done in full, once. Above that the leading directions come from
    block power iteration (see ops/truncated_svd.py), and the full SVD, if it is asked for, is done in float32: its
    directions are good to about 1e-6 over the relative gap to the next singular value.
    """

    def __init__(self, W: Tensor) -> None:
        self.W = W
        self.small = min(W.shape) <= EXACT_UP_TO
        self._whole: Triplets | None = None
        self._top: Triplets | None = None

    def whole(self) -> Triplets:
        """`U` (out, k), `S` (k,), `Vh` (k, in) with k = min(out, in)."""
        if self._whole is None:
            W = self.W if self.small else self.W.float()
            self._whole = torch.linalg.svd(W, full_matrices=False)
        return self._whole

    def top(self, rank: int) -> Triplets:
        """The first `rank` of them (or all that there are)."""
        if self.small:
            self._top = self.whole()
        if self._top is None or self._top[1].numel() < min(rank, *self.W.shape):
            self._top = top_singular(self.W, rank)
        U, S, Vh = self._top
        return U[:, :rank], S[:rank], Vh[:rank]
