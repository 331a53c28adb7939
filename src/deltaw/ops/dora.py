"""Row norms of W + scale·BA by factors."""

from __future__ import annotations

from torch import Tensor


def row_squares(weight: Tensor) -> Tensor:
    """‖W‖² per row, (..., out, in) -> (..., out)."""
    return (weight * weight).sum(-1)


def row_norms(squares: Tensor, product: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + scale·BA‖ per row, (..., out), from ‖W‖² (..., out) and A Wᵀ (..., rank, out)."""
    cross = (B * product.mT).sum(-1)
    own = ((B @ (A @ A.mT)) * B).sum(-1)
    return (squares + 2 * scale * cross + scale * scale * own).clamp_min(0).sqrt()
