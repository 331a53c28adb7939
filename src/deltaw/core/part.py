"""Parts of a weight as sites: "weight[0:64]" is the first 64 rows of the (out, in) matrix of "weight".

A fused projection (q, k and v in one Linear) is adapted in chosen slices this way, as loralib and litgpt do: each slice
is a site of its own, with its own tensors, and the host puts its change in the right rows.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def parameter_of(site: str) -> str:
    """The parameter that a site is (a part of): "weight[0:64]" -> "weight"."""
    return site.partition("[")[0]


def rows_of(site: str) -> slice | None:
    """The rows that a site means, or None for all of them: "weight[0:64]" -> slice(0, 64)."""
    _, bracket, inside = site.partition("[")
    if not bracket:
        return None
    start, _, stop = inside[:-1].partition(":")
    return slice(int(start), int(stop))


def part(matrix: Tensor, rows: slice | None) -> Tensor:
    """Those rows of (..., out, in), a view."""
    return matrix if rows is None else matrix[..., rows, :]


def placed(change: Tensor, rows: slice | None, out: int) -> Tensor:
    """(..., rows, in) -> (..., out, in), zero elsewhere. The inverse of `part`."""
    return change if rows is None else F.pad(change, (0, 0, rows.start, out - rows.stop))


def placed_rows(values: Tensor, rows: slice | None, out: int) -> Tensor:
    """(rows,) -> (out,), zero elsewhere: for biases and row gains."""
    return values if rows is None else F.pad(values, (rows.start, out - rows.stop))
