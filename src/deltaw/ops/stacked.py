"""Very many very short segments, as in decoding: all adapters of one weight side by side, as one masked adapter.

    y = x Wᵀ + b + own(x A_allᵀ) B_allᵀ

where `own` keeps, in each row, the columns of that row's adapter. The other rows' B are then multiplied by zero, and
0 x NaN is NaN: so only adapters whose factors are finite are stacked, and only for inference (in training a factor may
stop being finite later). The exact twin is `grouped_linear`, one row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.errors import ConfigError, NonFinite
from deltaw.ops.terms import Factors, flat


@dataclass(frozen=True)
class Stack:
    """Many adapters of one weight side by side. A is (R, in), B (out, R) with the scales in it, owner (R,)."""

    A: Tensor
    B: Tensor
    owner: Tensor


def stack(adapters: Sequence[Factors]) -> Stack:
    """`adapters` side by side, once, at load; adapter i is called i in `stacked_linear`.

    Raises:
        ConfigError: an adapter has a gain (DoRA): that is no product of two thin factors.
        NonFinite: a factor is not finite; it would reach the other rows through 0 x NaN.
    """
    for i, a in enumerate(adapters):
        if a.gain is not None:
            raise ConfigError(f"adapter {i} has a gain (DoRA) and cannot be stacked: use grouped_linear")
        if not bool(torch.isfinite(a.A).all() and torch.isfinite(a.B).all()):
            raise NonFinite(f"adapter {i} is not finite and cannot be stacked with others: use grouped_linear")
    return Stack(
        torch.cat([a.A for a in adapters]).detach(),
        torch.cat([a.B * a.scale for a in adapters], dim=1).detach(),
        torch.cat([torch.full((a.A.shape[0],), i, device=a.A.device) for i, a in enumerate(adapters)]),
    )


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, together: Stack, owners: Tensor) -> Tensor:
    """The adapted linear where row i of x (rows, ..., in) has the adapter `owners[i]`, -1 for none. Inference only."""
    with torch.no_grad():
        y = F.linear(x, weight, bias)
        h = F.linear(x, together.A.to(x.dtype))  # (rows, ..., R)
        own = owners.view(-1, *[1] * (x.ndim - 1)) == together.owner
        flat(y).addmm_(flat(torch.where(own, h, 0)), together.B.to(x.dtype).t())
        return y
