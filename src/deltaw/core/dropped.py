"""Dropout in layers that run with W + ΔW: whole features, one mask for every row and time step (arXiv:1512.05287)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.core.variant import Delta, Dense


def dropped(delta: Delta, weight: Tensor) -> Tensor | None:
    """ΔW (..., out, in) under the variant's dropout of whole features, or None if it has no dropout to apply."""
    terms = delta.low_rank(Dense(weight))
    if terms is None or not any(t.dropout for t in terms):
        return None
    total = torch.zeros((), dtype=delta.site.dtype, device=weight.device)
    for t in terms:
        A, B = t.A, t.B
        if t.dropout and t.dropout_at == "input":
            A = A * nn.functional.dropout(torch.ones_like(A[..., :1, :]), t.dropout)
        elif t.dropout:
            B = B * nn.functional.dropout(torch.ones_like(B[..., :, :1]), t.dropout)
        total = total + t.scale * (B @ A)
        if t.gain is not None:
            total = total + t.gain.unsqueeze(-1) * weight
    return total
