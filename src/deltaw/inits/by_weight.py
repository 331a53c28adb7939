"""Starts from the frozen weight itself: PiSSA, MiLoRA, OLoRA.

Each puts a part of W into the factors, s·B₀A₀ = that part. In the papers the part is taken out of the base; here a frozen
copy of the start takes it away again (see `deltaw.core.starting`), so a 16-bit base is never rounded a second time.
Directions beyond min(out, in) do not exist in W: those rows of A start random, those columns of B zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.core.registry import init
from deltaw.core.starting import Start
from deltaw.errors import ConfigError
from deltaw.ops.truncated_svd import top_singular


class Singular(Start):
    """B = U √(S/s), A = √(S/s) Vᵀ for some of the singular triplets of W, so that s·BA is that part of W."""

    looks_at = "weight"
    offset = True
    exact = False
    largest: bool

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.largest and weight.ndim == 2:
            U, S, Vh = top_singular(weight, rank)
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            part = slice(0, rank) if self.largest else slice(max(0, S.shape[-1] - rank), None)
            U, S, Vh = U[..., part], S[..., part], Vh[..., part, :]
        return split(U, S, Vh, rank, scale)


class Pissa(Singular):
    """PiSSA: the largest singular triplets of W (Meng et al. 2024, arXiv:2404.02948)."""

    largest = True


class Milora(Singular):
    """MiLoRA: the smallest singular triplets of W (Wang et al. 2024, arXiv:2406.09044)."""

    largest = False


class Olora(Start):
    """OLoRA: W = QR, B the first columns of Q, A the first rows of R (Büyükakyüz 2024, arXiv:2406.01775)."""

    looks_at = "weight"
    offset = True
    exact = False

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)
        return padded(R[..., :rank, :], Q[..., :rank], rank)


class Orthogonal(Start):
    """A and B random, with B A = 0 because they use orthogonal halves of one random basis of the rank's space.

    The rank must be even. Both learn from the first step on. (The rule that PEFT calls "orthogonal".)
    """

    looks_at = "shape"
    exact = False

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        if rank % 2:
            raise ConfigError(f"init='orthogonal' splits the rank in two halves: rank={rank} is odd, use {rank + 1}")
        *stack, out, columns = weight.shape
        Q = torch.linalg.qr(weight.new_empty(*stack, rank, rank).normal_()).Q
        A = Q[..., 0::2, :].mT @ weight.new_empty(*stack, rank // 2, columns).normal_(std=0.1)
        B = weight.new_empty(*stack, out, rank // 2).normal_(std=0.1) @ Q[..., 1::2, :]
        return A, B


def split(U: Tensor, S: Tensor, Vh: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with s·BA = U S Vᵀ, the singular values shared evenly, filled up to `rank`."""
    root = (S / scale).clamp_min(0).sqrt()
    return padded(root[..., None] * Vh, U * root[..., None, :], rank)


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A filled up to `rank` rows with small random ones, B with columns of zeros: their product stays the same."""
    missing = rank - A.shape[-2]
    if not missing:
        return A, B
    bound = 1 / math.sqrt(A.shape[-1])
    more = A.new_empty(*A.shape[:-2], missing, A.shape[-1]).uniform_(-bound, bound)
    return torch.cat([A, more], -2), torch.cat([B, B.new_zeros(*B.shape[:-1], missing)], -1)


init("pissa")(Pissa())
init("milora")(Milora())
init("olora")(Olora())
init("orthogonal")(Orthogonal())
