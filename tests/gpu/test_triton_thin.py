"""The Triton kernels against their plain twins: on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below
pytest.importorskip("triton", reason="Triton is not installed")

from deltaw.ops import triton_thin as thin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1, 1), (9, 41, 3), (33, 70, 8), (70, 128, 17)]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(DEVICE)


def seed_of(p: float) -> torch.Tensor | None:
    return torch.tensor(-77, dtype=torch.int32, device=DEVICE) if p else None


@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_shrink(rows: int, width: int, rank: int, p: float) -> None:
    x, A = noise(rows, width), noise(rank, width)
    torch.testing.assert_close(
        thin.shrink(x, A, seed=seed_of(p), p=p), thin.shrink_reference(x, A, seed=seed_of(p), p=p), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
def test_expand(rows: int, width: int, rank: int, p: float, dora: bool) -> None:
    y, h, B = noise(rows, width), noise(rows, rank), noise(rank, width)
    more = {"seed": seed_of(p), "p": p}
    if dora:
        more |= {"gain": noise(width), "shift": noise(width) + 1}
    expected = thin.expand_reference(y, h, B, 0.5, **more)
    assert thin.expand_(y, h, B, 0.5, **more).data_ptr() == y.data_ptr()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_outer(rows: int, width: int, rank: int, p: float) -> None:
    u, x = noise(rows, rank), noise(rows, width)
    torch.testing.assert_close(
        thin.outer(u, x, seed=seed_of(p), p=p), thin.outer_reference(u, x, seed=seed_of(p), p=p), rtol=1e-5, atol=1e-4
    )


def test_strided_rows() -> None:
    x, A = noise(40, 100)[:, :70], noise(8, 70)
    torch.testing.assert_close(thin.shrink(x, A), thin.shrink_reference(x, A), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_summed_in_32(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 products")
    x, A = noise(40, 70, dtype=dtype), noise(8, 70, dtype=dtype)
    torch.testing.assert_close(thin.shrink(x, A), thin.shrink_reference(x, A), rtol=1e-3, atol=1e-2)


def test_no_rows() -> None:
    assert thin.shrink(noise(0, 8), noise(4, 8)).shape == (0, 4)
    assert thin.outer(noise(0, 4), noise(0, 8)).shape == (4, 8)


def test_a_sorted_batch_with_a_canary() -> None:
    """Adapter 1 is full of NaN; rows 0..2 and 50 have none: only adapter 1's rows may change to NaN."""
    x, A, B = noise(60, 41), noise(3, 5, 41), noise(3, 5, 33)
    A[1], B[1] = float("nan"), float("nan")
    segments = [(2, 40, 0), (40, 45, 1), (45, 50, 2), (51, 60, 0)]
    tiles = thin.tiles_of(segments, DEVICE)
    y = noise(60, 33)
    before = y.clone()
    thin.expand_(y, thin.shrink(x, A, tiles=tiles), B, 0.7, tiles=tiles)
    expected = before.clone()
    for start, stop, i in segments:
        expected[start:stop] += 0.7 * (x[start:stop] @ A[i].t()) @ B[i]
    assert y[40:45].isnan().all()
    healthy = [*range(40), *range(45, 60)]
    torch.testing.assert_close(y[healthy], expected[healthy], rtol=1e-5, atol=1e-4)
    assert torch.equal(y[[0, 1, 50]], before[[0, 1, 50]])
