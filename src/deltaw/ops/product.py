"""A matrix kept as a product of two thin ones, and its exact singular value decomposition without ever forming it.

With `left = Q₁R₁` and `rightᵀ = Q₂R₂` (two thin QRs), `left @ right = Q₁ (R₁R₂ᵀ) Q₂ᵀ`, and the k x k core's SVD is the
whole matrix's: O((out + in)·k²) instead of O(out·in·min(out, in)). The norm comes from the same core, so that
that of a difference of nearly equal products is not lost to cancellation as it is in `trace(LᵀL · RRᵀ)`. Inner products
are such traces, with roundings as large as those of ‖L‖‖R‖; of a matrix with itself `norm` is the one to ask.

All of it is computed in float64: the factors are thin, and what is decided from small singular values (rank, energy,
angles between subspaces) does not survive single precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """The (out, in) matrix `scale · left @ right`. `left` is (out, k), `right` is (k, in)."""

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def width(self) -> int:
        """k, the inner size: an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix itself, (out, in)."""
        return self.scale * (self.left.to(dtype) @ self.right.to(dtype))

    def scaled(self, factor: float) -> Product:
        """`factor` times the matrix."""
        return Product(self.left, self.right, self.scale * factor)

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal `P` (out, p) and `Q` (in, q) and a small `C` (p, q): the matrix is `P C Qᵀ`. In float64."""
        P, R_left = torch.linalg.qr(self.left.double())
        Q, R_right = torch.linalg.qr(self.right.double().T)
        return P, self.scale * (R_left @ R_right.T), Q

    def norm(self) -> float:
        """Frobenius norm."""
        if self.width == 0:
            return 0.0
        return float(torch.linalg.matrix_norm(self.core()[1]))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U` (out, p), `S` (p,), `Vh` (p, in), p = min(k, out, in): the singular value decomposition, in float64."""
        P, C, Q = self.core()
        U, S, Vh = torch.linalg.svd(C, full_matrices=False)
        return P @ U, S, Vh @ Q.T

    def singular_values(self) -> Tensor:
        """(min(k, out, in),) in float64, descending."""
        values: Tensor = torch.linalg.svdvals(self.core()[1])
        return values

    def inner(self, other: Product) -> float:
        """⟨self, other⟩ = trace(selfᵀ other)."""
        lefts = self.left.double().T @ other.left.double()  # (k, k')
        rights = self.right.double() @ other.right.double().T  # (k, k')
        return self.scale * other.scale * float((lefts * rights).sum())


def total(parts: Iterable[Product]) -> Product:
    """The sum of products, exactly: the factors side by side, scales moved to the left ones. Widths add up."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    return Product(
        torch.cat([p.left.double() * p.scale for p in parts], dim=1),
        torch.cat([p.right.double() for p in parts], dim=0),
    )
