"""The adapted linear of small products: torch's own operations and their derivatives, composed.

The function is linear.py's. Its products take some ten microseconds each here, and the fused operation's bookkeeping in
Python takes more than its passes save (select.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.select import WIDE
from deltaw.ops.terms import Term, flat, total_gain


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """x Wᵀ + b + the changes of all `terms`, (..., in) -> (..., out), differentiable as often as wished."""
    rows = flat(x)
    if x.dim() == 2 or x.is_contiguous():
        y = F.linear(rows, weight, bias)
    else:  # torch has another kernel for it, with roundings of its own
        y = flat(F.linear(x, weight, bias))
    gain = total_gain(terms)
    if gain is not None and bias is not None:  # backward keeps z, not y: 16 bit (compact) round y at the size of b
        z = y - bias if y.dtype in WIDE else F.linear(rows, weight)
        y = (y + gain * z).to(y.dtype)
    elif gain is not None:
        y = (y * (1 + gain)).to(y.dtype)
    for t in terms:
        A, B = (t.A, t.B) if t.A.dtype == t.B.dtype == y.dtype else (t.A.to(y.dtype), t.B.to(y.dtype))
        mask, drop = t.input_mask(rows), t.output_mask(y)
        h = F.linear(rows if mask is None else rows * mask.rows(slice(None)), A)
        if drop is None:
            y = torch.addmm(y, h, B.t(), alpha=t.scale)
        else:
            y = torch.addcmul(y, h @ B.t(), drop.rows(slice(None)), value=t.scale)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
