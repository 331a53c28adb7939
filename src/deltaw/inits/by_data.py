"""Starts that look at what the layer sees: EVA and CorDA at its inputs, LoRA-GA at the loss's gradient of its weight.

`dw.initialize(model, batches)` runs the model on a few batches and hands each weight's observer what it sees. Memory per
weight: EVA (2 rank, in), CorDA (in, in), LoRA-GA (out, in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.core.registry import init
from deltaw.core.starting import Observer, Start, as_wide
from deltaw.errors import ConfigError
from deltaw.inits.by_weight import padded, split
from deltaw.ops.truncated_svd import top_singular


class Directions(Observer):
    """The leading right singular vectors of all inputs so far, stacked: an SVD that takes in one batch at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: Tensor | None = None
        self.energy = 0.0

    def see(self, rows: Tensor) -> None:
        rows = as_wide(rows)
        self.energy += float(rows.square().sum())
        stack = rows if self.held is None else torch.cat([self.held, rows])  # (k + tokens, in)
        if stack.shape[0] > stack.shape[1]:
            stack = torch.linalg.qr(stack, mode="r").R
        _, S, Vh = top_singular(stack, self.count)
        self.held = S[:, None] * Vh

    def result(self) -> Tensor:
        """Each direction times its singular value, over the root of the energy of all inputs, (k, in)."""
        assert self.held is not None
        return self.held / math.sqrt(self.energy) if self.energy else self.held


class Eva(Start):
    """EVA: the rows of A are the directions in which the inputs vary most (Paischer et al. 2024, arXiv:2410.07170).

    B starts at zero. The paper's redistribution of ranks is `dw.initialize(..., spread=2)`.
    """

    looks_at = "inputs"

    def observer(self, rank: int) -> Observer:
        return Directions(2 * rank)

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        assert seen is not None
        lengths = torch.linalg.vector_norm(seen, dim=1)
        real = lengths > 1e-6 * lengths.max()
        A = (seen[real] / lengths[real, None])[:rank].to(weight)
        return padded(A, weight.new_zeros(weight.shape[0], A.shape[0]), rank)

    def shares(self, seen: Tensor) -> Tensor:
        return seen.square().sum(1)


class SecondMoment(Observer):
    """The mean of xxᵀ over all inputs x, (in, in)."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def see(self, rows: Tensor) -> None:
        rows = as_wide(rows)
        product = rows.T @ rows
        self.total = product if self.total is None else self.total.add_(product)
        self.count += rows.shape[0]

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / max(1, self.count)


class Corda(Start):
    """CorDA: W C = U S Vᵀ with C the inputs' second moment; the factors hold some triplets of U S (Vᵀ C⁻¹) = W.

    largest: what matters most for the given data ("corda", to learn a task like it), or least ("corda-kpm", to learn
    something else and keep what the data show). Yang et al. 2024, arXiv:2406.05223.
    """

    looks_at = "inputs"
    offset = True
    exact = False

    def __init__(self, largest: bool) -> None:
        self.largest = largest

    def observer(self, rank: int) -> Observer:
        return SecondMoment()

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        assert seen is not None
        moment = seen.to(weight)
        moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)  # invertible
        if self.largest:
            U, S, Vh = top_singular(weight @ moment, rank)
        else:
            U, S, Vh = torch.linalg.svd(weight @ moment, full_matrices=False)
            U, S, Vh = U[:, -rank:], S[-rank:], Vh[-rank:]
        back = torch.linalg.solve(moment.double(), Vh.T.double()).T.to(weight)  # Vᵀ C⁻¹, C is symmetric
        return split(U, S, back, rank, scale)


class MeanGradient(Observer):
    """The sum of all gradients seen; their number does not matter to what is made of it."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        rows = as_wide(rows)
        self.total = rows.clone() if self.total is None else self.total.add_(rows)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total


class LoraGa(Start):
    """LoRA-GA: the first step changes W as the best rank-2r approximation of its gradient would (Wang et al. 2024, arXiv:2407.05000).

    With the gradient G = U S Vᵀ: A = c V[:r]ᵀ, B = c U[r:2r], c = out^¼/√γ, γ = 16.
    """

    looks_at = "gradient"
    offset = True
    exact = False
    gamma = 16.0

    def observer(self, rank: int) -> Observer:
        return MeanGradient()

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        assert seen is not None
        out, columns = weight.shape[-2:]
        if 2 * rank > min(out, columns):
            raise ConfigError(
                f"init='lora-ga' takes 2 x rank directions of the gradient: rank={rank} is too large for a weight "
                f"({out}, {columns}), at most {min(out, columns) // 2}"
            )
        U, _, Vh = (
            top_singular(seen.to(weight), 2 * rank)
            if seen.ndim == 2
            else torch.linalg.svd(seen.to(weight), full_matrices=False)
        )
        c = out**0.25 / math.sqrt(self.gamma)
        return c * Vh[..., :rank, :], c * U[..., rank : 2 * rank]


class Loftq(Start):
    """LoftQ: over a quantised base Q, sBA starts as the best rank-r approximation of W - Q (Li et al. 2023, arXiv:2310.08659).

    One round of the paper's alternation, so that the quantised base stays as it is. A fresh adapter moves the model
    towards the unquantised one: `dw.initialize(model, originals=...)` takes the unquantised weights.
    """

    looks_at = "original"

    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        assert seen is not None
        residual = seen.to(weight) - weight
        U, S, Vh = (
            top_singular(residual, rank) if residual.ndim == 2 else torch.linalg.svd(residual, full_matrices=False)
        )
        return split(U[..., :rank], S[..., :rank], Vh[..., :rank, :], rank, scale)


init("eva")(Eva())
init("corda")(Corda(largest=True))
init("corda-kpm")(Corda(largest=False))
init("lora-ga")(LoraGa())
init("loftq")(Loftq())
