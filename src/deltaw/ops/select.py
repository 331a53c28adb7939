"""Which kernel runs, and why: the rules that `deltaw ops` prints.

Merged or added. Applying a rank-r change to T rows costs 2Tr(in + out) operations and a pass over the output; forming
W' = W + s B A costs 2r·in·out and a pass over the weight. So W' is cheaper where T > in·out / (in + out). It is exact
up to one rounding per weight in 32 and 64 bit; in 16 bit that rounding would swallow a small change, so never there.
"""

from __future__ import annotations

import torch

WIDE = (torch.float32, torch.float64)


def use_merged(rows_out: int, columns_in: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether the adapted linear forms W' for this call (there is no dropout and W is dense)."""
    return dtype in WIDE and tokens * (rows_out + columns_in) > rows_out * columns_in
