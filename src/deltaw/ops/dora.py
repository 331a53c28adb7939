"""DoRA's row norms by factors (arXiv:2402.09353; the expansion: arXiv:2603.22276).

Of a row w of W with its change s b A, b a row of B (r,):

    ‖w + s b A‖² = ‖w‖² + 2s ⟨b, w Aᵀ⟩ + s² b (A Aᵀ) bᵀ = ‖w‖² + ⟨b, 2s w Aᵀ + s² b (A Aᵀ)⟩

so that neither BA (out, in) nor its sum with W is formed: the only product with W is the thin A Wᵀ (r, out), and ‖w‖²
is the caller's to keep, since W is frozen. With B = 0 the result is sqrt(‖w‖²) to the bit. The norm is a constant for
the gradient (the paper's section 4.3). The plain twin is `row_norms_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.ops.cpu_thin import Sweep, takes
from deltaw.ops.select import is_narrow


def row_squares(weight: Tensor) -> Tensor:
    """‖W‖² per row, (..., out, in) -> (..., out)."""
    return (weight * weight).sum(-1)


def row_norms(squares: Tensor, product: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + scale·BA‖ per row, (..., out), from ‖W‖² (..., out), A Wᵀ (..., r, out), A (..., r, in), B (..., out, r).

    Rounding may leave a row that cancels slightly below zero: it counts as zero.
    """
    gram = A @ A.mT  # (..., r, r)
    if B.ndim == 2:
        inner = torch.addmm(product.mT, B, gram, beta=2 * scale, alpha=scale * scale)
    else:
        inner = 2 * scale * product.mT + scale * scale * (B @ gram)
    norms: Tensor = (inner.mul_(B).sum(-1) + squares).clamp_min_(0).sqrt_()
    return norms


def row_norms_of(weight: Tensor, squares: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`row_norms` of a W (out, in) that is at hand, in one sweep over its rows where that is compiled. Not differentiable."""
    gram = A @ A.mT  # in 16 bit under autocast
    if takes(weight, factors=(squares, A, B, gram)) and is_narrow(A.shape[0], shared=True):
        sweep = Sweep()
        changed = sweep.squares(squares, sweep.shrink(weight, A), B, gram, scale)
        sweep.run()
        return changed.sqrt_()
    return row_norms(squares, torch.nn.functional.linear(A, weight.to(A.dtype)), A, B, scale)


def row_norms_reference(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + scale·BA‖ per row, (..., out), from the dense change."""
    norms: Tensor = torch.linalg.vector_norm(weight + scale * (B @ A), dim=-1)
    return norms
