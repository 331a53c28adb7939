"""From a blended change to the LoRA factors that are kept, and how far these are from what they stand for.

The scale is baked into the factors (alpha = rank, scale 1), so that every reader finds the same ΔW whatever it thinks
of alpha. After an SVD each side carries √σ, so that neither factor is much larger than the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.core.true_change import Matrix
from deltaw.ops.product import Product, total
from deltaw.ops.truncated_svd import rank_for_energy, top_singular


def compress(matrix: Matrix, *, rank: int | None, energy: float | None, seed: int = 0) -> Product:
    """`left` (out, k) and `right` (k, in) with scale 1 that stand for `matrix`, in float64.

    With neither `rank` nor `energy` nothing is lost: factors stay as they are unless they are wider than the matrix, and
    a dense matrix is multiplied by an identity on its smaller side. With both, the smaller k of the two.
    """
    out, columns = matrix.shape
    if rank is None and energy is None:
        if isinstance(matrix, Product) and matrix.width <= min(out, columns):
            return Product(matrix.left.double() * matrix.scale, matrix.right.double())
        dense = matrix.dense() if isinstance(matrix, Product) else matrix
        eye = torch.eye(min(out, columns), dtype=torch.float64, device=dense.device)
        return Product(dense, eye) if columns <= out else Product(eye, dense)
    if isinstance(matrix, Product):
        U, S, Vh = matrix.svd()
        keep = S.numel()
    else:
        wanted = min(out, columns) if rank is None else rank
        U, S, Vh = top_singular(matrix, wanted, seed=seed)
        keep = min(wanted, S.numel())
    if energy is not None:
        squares = None if isinstance(matrix, Product) else float(matrix.square().sum())
        keep = min(keep, rank_for_energy(S, energy, squares))
    if rank is not None:
        keep = min(keep, rank)
    keep = max(keep, 1)
    root = S[:keep].sqrt()
    return Product(U[:, :keep] * root, root[:, None] * Vh[:keep])


def distance(a: Matrix, b: Matrix) -> float:
    """‖a - b‖_F."""
    if isinstance(a, Product) and isinstance(b, Product):
        return total([a, b.scaled(-1.0)]).norm()
    return float((_dense(a) - _dense(b)).norm())


def length(a: Matrix) -> float:
    """‖a‖_F."""
    return a.norm() if isinstance(a, Product) else float(a.norm())


def relative_error(kept: Sequence[Matrix], exact: Sequence[Matrix], parts: float) -> float:
    """‖kept - exact‖ / ‖exact‖ over all matrices; where the parts (of lengths that add up to `parts`) cancel, relative
    to them instead.
    """
    error = math.hypot(*(distance(k, e) for k, e in zip(kept, exact)))
    size = math.hypot(*(length(e) for e in exact))
    if size <= 1e-12 * parts:
        size = parts
    return error / size if size > 0 else error


def _dense(matrix: Matrix) -> Tensor:
    return matrix.dense() if isinstance(matrix, Product) else matrix.double()
