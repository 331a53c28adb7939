"""nn.Embedding: a look-up, whose matrix is weightᵀ (dim, number of embeddings), as PEFT and loralib have it.

So A is (rank, number) and B (dim, rank): the change of a token is scale · B A[:, id], a look-up in Aᵀ and one small
product. `max_norm` scales the rows of W + ΔW that were looked up; unlike nn.Embedding, nothing is written into W.
A starts at zero and B at random, the reverse of other layers, as in PEFT and loralib. Gradients are nn.Embedding's: none from `padding_idx`, divided by a token's count under `scale_grad_by_freq`, and taken
at the scaled row under `max_norm`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.core.variant import LowRank
from deltaw.layers.output import OutputHost, added
from deltaw.ops.matmul import transformed

TINY = 1e-7
"""What nn.Embedding adds to a norm before it divides by it."""


class EmbeddingMatrix(OutputHost):
    """An embedding's weight (number, dim) as the matrix (dim, number)."""

    lookup: ClassVar[bool] = True

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        number, dim = layer.weight.shape  # type: ignore[misc]
        return {"weight": (int(dim), int(number))}

    def to_matrix(self, site: str, stored: Tensor) -> Tensor:
        return stored.mT

    def from_matrix(self, site: str, matrix: Tensor) -> Tensor:
        return matrix.mT

    def listed_as(self) -> str:
        return EmbeddingHost.family


@host
class EmbeddingHost(EmbeddingMatrix, nn.Embedding):
    """An adapted nn.Embedding."""

    family: ClassVar[str] = "embedding"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        def ids(dtype: torch.dtype) -> tuple[Tensor]:
            return (torch.tensor([[1, 4, 1], [0, 10, 4]]),)

        yield Example("embedding", lambda: nn.Embedding(11, 6), ids)
        yield Example("padding", lambda: nn.Embedding(11, 6, padding_idx=4), ids)
        yield Example("padding from the end", lambda: nn.Embedding(11, 6, padding_idx=-1), ids)
        yield Example("max_norm", lambda: short_rows(max_norm=1.5), ids)
        yield Example("max_norm 1", lambda: short_rows(max_norm=2.0, norm_type=1.0), ids)
        yield Example("by frequency", lambda: nn.Embedding(11, 6, padding_idx=0, scale_grad_by_freq=True), ids)
        yield Example("square", lambda: nn.Embedding(11, 11), ids)
        yield Example("one id", lambda: nn.Embedding(11, 3), lambda dtype: (torch.tensor(7),))
        yield Example("no ids", lambda: nn.Embedding(11, 3), lambda dtype: (torch.zeros(2, 0, dtype=torch.long),))
        yield Example(
            "int32 ids", lambda: nn.Embedding(11, 3), lambda dtype: (torch.tensor([3, 3], dtype=torch.int32),)
        )

    def forward(self, ids: Tensor) -> Tensor:
        sites = self.active_sites()
        terms = self.low_rank() if sites else []
        if terms:
            rows = added(F.embedding(ids, self.weight), None, terms, self.looked_up(ids), training=self.training)
            shares = self.shares(ids)
        else:
            weight = self.changed("weight", dropout=self.training)
            sparse = self.sparse and weight.is_leaf
            rows = F.embedding(ids, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, sparse)
            shares = None
        factors = None if self.max_norm is None else norm_factors(rows.detach(), self.max_norm, self.norm_type)
        return rows if shares is None and factors is None else scaled(rows, factors, shares)

    def looked_up(self, ids: Tensor) -> Any:
        """B A[:, ids] of a term, (..., dim). Dropout at the input drops a token's whole change: its input is one-hot."""

        def low(t: LowRank) -> Tensor:
            found = F.embedding(ids, t.A.mT)  # (..., rank)
            if self.training and t.dropout and t.dropout_at == "input":
                found = found * F.dropout(torch.ones_like(found[..., :1]), t.dropout)
            return found @ t.B.mT

        return low

    def shares(self, ids: Tensor) -> Tensor | None:
        """By what the gradient of each looked-up row is multiplied, (..., 1), or None for 1."""
        if self.padding_idx is None and not self.scale_grad_by_freq:
            return None
        shares = torch.ones(ids.shape, dtype=self.weight.dtype, device=ids.device)
        if self.scale_grad_by_freq:
            shares = shares / torch.bincount(ids.flatten(), minlength=self.num_embeddings)[ids.long()]
        if self.padding_idx is not None:
            shares = shares.masked_fill(ids == self.padding_idx, 0)
        return shares.unsqueeze(-1)


def norm_factors(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """By what each row (..., dim) must be multiplied so that its norm is at most `max_norm`, (..., 1)."""
    norms = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    return torch.where(norms > max_norm, max_norm / (norms + TINY), torch.ones_like(norms))


def short_rows(**options: Any) -> nn.Embedding:
    """An embedding whose rows reach `max_norm` only once they change (a plain one writes into its weight otherwise)."""
    layer = nn.Embedding(11, 6, **options)
    with torch.no_grad():
        layer.weight.mul_(0.1)
    return layer


def scaled(rows: Tensor, factors: Tensor | None, shares: Tensor | None) -> Tensor:
    """rows · factors, with the gradient g · shares: what nn.Embedding's in-place `max_norm` amounts to."""
    if not transformed():
        return Scaled.apply(rows, factors, shares)  # type: ignore[no-any-return, no-untyped-call]
    values = rows if factors is None else rows * factors
    moved = rows - rows.detach()  # zero, and its derivative is that of the rows
    return values.detach() + (moved if shares is None else moved * shares)


class Scaled(torch.autograd.Function):
    """`scaled` as one operation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factors: Tensor | None, shares: Tensor | None) -> Tensor:
        """(..., dim) -> (..., dim)."""
        ctx.save_for_backward(shares)
        return rows.clone() if factors is None else rows * factors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        """(..., dim) -> (..., dim)."""
        (shares,) = ctx.saved_tensors
        return grads[0] if shares is None else grads[0] * shares.to(grads[0].dtype), None, None
