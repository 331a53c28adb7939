"""DoRA's norms by factors: those of the dense matrix."""

from __future__ import annotations

import pytest
import torch

from deltaw.ops import cpu_thin
from deltaw.ops.dora import row_norms, row_norms_of, row_norms_reference, row_squares


@pytest.mark.parametrize("shape", [(4, 5), (1, 9), (41, 9), (3, 4, 5)])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_equal_to_the_dense_norms(shape: tuple[int, ...], rank: int, scale: float) -> None:
    torch.manual_seed(0)
    *lead, out, width = shape
    W, A, B = (torch.randn(*lead, *s, dtype=torch.float64) for s in ((out, width), (rank, width), (out, rank)))
    norms = row_norms(row_squares(W), A @ W.mT, A, B, scale)
    torch.testing.assert_close(norms, row_norms_reference(W, A, B, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(1, 9), (41, 9), (300, 640)])
@pytest.mark.parametrize("rank", [1, 5, 8, 16, 17])
def test_of_a_weight_at_hand(
    shape: tuple[int, int], rank: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_thin, "library", lambda: "the twin")
    torch.manual_seed(0)
    out, width = shape
    W, A, B = torch.randn(out, width), torch.randn(rank, width), torch.randn(out, rank)
    # three sums of up to 640 products of numbers of size 1, in 32 bit
    exact = row_norms_reference(W.double(), A.double(), B.double(), 1.5)
    torch.testing.assert_close(row_norms_of(W, row_squares(W), A, B, 1.5).double(), exact, rtol=2e-6, atol=0)
    assert torch.equal(row_norms_of(W, row_squares(W), A, torch.zeros_like(B), 1.5), row_squares(W).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_change_they_are_the_base_norms_to_the_bit(dtype: torch.dtype) -> None:
    W, A, B = torch.randn(40, 30, dtype=dtype), torch.randn(8, 30, dtype=dtype), torch.zeros(40, 8, dtype=dtype)
    assert torch.equal(row_norms(row_squares(W), A @ W.T, A, B, 2.0), row_squares(W).sqrt())


def test_a_row_that_cancels_has_the_norm_zero_not_nan() -> None:
    A = torch.randn(3, 50)
    B = torch.randn(20, 3)
    W = -(B @ A)
    for norms in (row_norms(row_squares(W), A @ W.T, A, B, 1.0), row_norms_of(W, row_squares(W), A, B, 1.0)):
        assert torch.isfinite(norms).all()
        # The terms of size ‖w‖² cancel: what is left is the square root of their rounding.
        assert (norms < 2e-3 * row_squares(W).sqrt()).all()
