"""The leading singular triplets of a dense matrix: exact where that is cheap, else by seeded block power iteration.

Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv:0909.4061), algorithm 4.4: a random block, a few
rounds of `X ← qr(Mᵀ qr(M X))`, then the SVD of a thin projection. The block is drawn from its own seeded generator:
torch's global one is neither read nor moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 1536
"""Matrices whose smaller side is at most this are decomposed in full."""


def top_singular(matrix: Tensor, rank: int, *, seed: int = 0, rounds: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """`U` (out, k), `S` (k,), `Vh` (k, in) with k = min(rank, out, in), the largest singular values first.

    `matrix` is (out, in); computed in its own dtype. `rounds` of power iteration are only used where the smaller side
    is over `EXACT_UP_TO` and `rank` well below it.
    """
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    block = rank + max(8, rank // 4)
    if smaller <= EXACT_UP_TO or block >= smaller // 2:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q  # (out, block)
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix.T @ basis).Q  # (in, block)
        basis = torch.linalg.qr(matrix @ basis).Q  # (out, block)
    U, S, Vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ U)[:, :rank], S[:rank], Vh[:rank]


def rank_for_energy(values: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest k such that the k largest singular `values` hold the share `energy` of Σσ² (`total`, if given)."""
    squares = values.double().square()
    wanted = energy * (float(squares.sum()) if total is None else total)
    held = squares.cumsum(0)
    # One rounding of slack: energy=1 must stop at the last value that is not noise, not run past the end.
    enough = held >= wanted * (1 - 1e-15 * max(1, values.numel()))
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else values.numel()
