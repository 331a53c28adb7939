"""8-bit products: equal to the formula, near the exact product, rows apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaw.errors import ConfigError
from deltaw.ops import int8

pytestmark = pytest.mark.skipif(not int8.int8_available(), reason="no VNNI on this processor")

SHAPES = [((64,), 48, 40), ((3, 5), 41, 9), ((1,), 1, 1), ((), 16, 8), ((0,), 16, 8), ((300,), 1000, 7)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm()) if b.numel() else 0.0


@pytest.mark.parametrize(("lead", "width", "out"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_both_products_are_the_formula(lead: tuple[int, ...], width: int, out: int, bias: bool) -> None:
    torch.manual_seed(0)
    w = int8.quantize_int8(torch.randn(out, width))
    x, g, b = torch.randn(*lead, width), torch.randn(*lead, out), torch.randn(out) if bias else None
    y = int8.int8_matmul(x, w, b)
    d = int8.int8_matmul_grad(g, w)
    assert y.shape == (*lead, out)
    assert d.shape == (*lead, width)
    # A number that lies half-way between two codes may round either way in 32 and in 64 bit: one code in a few thousand.
    assert relative(y, int8.int8_matmul_reference(x, w.codes, w.scales, b)) < 1e-3
    assert relative(d, int8.int8_matmul_grad_reference(g, w.codes, w.scales)) < 1e-3


def test_the_error_is_that_of_two_roundings_to_8_bit() -> None:
    torch.manual_seed(1)
    weight, x, g = torch.randn(384, 512), torch.randn(200, 512), torch.randn(200, 384)
    w = int8.quantize_int8(weight)
    # A rounding to steps of q has the variance q²/12; q = max/127, and the largest of 512 normals is about 3.2.
    bound = 2**0.5 * (3.8 / 127) / 12**0.5
    assert relative(int8.int8_matmul(x, w), x @ weight.t()) < bound
    assert relative(int8.int8_matmul_grad(g, w), g @ weight) < 1.2 * bound  # g ⊙ w has the heavier tails
    assert relative(w.dense(), weight) < bound / 2**0.5


def test_an_outlier_costs_only_its_own_token() -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(64, 128), torch.randn(10, 128)
    w = int8.quantize_int8(weight)
    before = int8.int8_matmul(x, w)
    x[3] *= 1e4
    x[3, 0] = 1e8
    after = int8.int8_matmul(x, w)
    others = [i for i in range(10) if i != 3]
    assert torch.equal(before[others], after[others])


def test_what_is_not_finite_stays_in_its_row_and_is_seen() -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2], x[3, 1] = float("nan"), 0.0, float("inf")
    y = int8.int8_matmul(x, int8.quantize_int8(torch.randn(32, 64)))
    assert torch.isfinite(y[0]).all()
    assert y[1].isnan().all()
    assert torch.equal(y[2], torch.zeros(32))
    assert not torch.isfinite(y[3]).any()


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(101, 32)
    w = int8.quantize_int8(torch.randn(16, 32))
    whole = int8.int8_matmul(x, w)
    monkeypatch.setattr(int8, "BLOCK", 7 * 32)
    assert torch.equal(int8.int8_matmul(x, w), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_went_in(dtype: torch.dtype) -> None:
    w = int8.quantize_int8(torch.randn(16, 32))
    x = torch.randn(5, 32).to(dtype)
    y = int8.int8_matmul(x, w)
    assert y.dtype == dtype
    assert relative(y, int8.int8_matmul_reference(x, w.codes, w.scales)) < 1e-2


def test_codes_and_scales_are_enough_to_build_it_again() -> None:
    w, x = int8.quantize_int8(torch.randn(16, 32)), torch.randn(5, 32)
    again = int8.kernels_of(w.codes.clone(), w.scales.clone())
    assert torch.equal(int8.int8_matmul(x, again), int8.int8_matmul(x, w))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        int8.quantize_int8(torch.tensor([[1.0, float("nan")]]))


def test_projections_of_one_input_quantise_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [int8.quantize_int8(torch.randn(16, 32)) for _ in range(3)]
    real, made = int8.quantize_rows, []
    monkeypatch.setattr(int8, "quantize_rows", lambda x, *a: (made.append(1), real(x, *a))[1])
    x = torch.randn(5, 32)
    for w in weights:
        int8.int8_matmul(x, w)
    assert len(made) == 1
    x.mul_(2)  # no longer what was quantised
    doubled = int8.int8_matmul(x, weights[0])
    assert len(made) == 2
    assert torch.equal(doubled, int8.int8_matmul(x.clone(), weights[0]))
    x.data = torch.randn(5, 32)
    assert torch.equal(int8.int8_matmul(x, weights[0]), int8.int8_matmul(x.clone(), weights[0]))
    with torch.inference_mode():
        int8.int8_matmul(torch.randn(5, 32), weights[0])


def test_memory_that_others_may_write_to_is_quantised_at_every_call() -> None:
    w = int8.quantize_int8(torch.randn(16, 32))
    buffer = np.ones((5, 32), np.float32)
    x = torch.from_numpy(buffer)
    first = int8.int8_matmul(x, w)
    buffer[:] = 2
    assert torch.equal(int8.int8_matmul(x, w), 2 * first)


def test_who_never_trains_packs_one_form() -> None:
    w = int8.quantize_int8(torch.randn(16, 32))
    assert w.nbytes == 0
    int8.int8_matmul(torch.randn(5, 32), w)
    assert w.nbytes == 16 * 32
    int8.int8_matmul_grad(torch.randn(5, 16), w)
    assert w.nbytes == 2 * 16 * 32


def test_codes_are_forgotten_with_what_they_were_made_of() -> None:
    w = int8.quantize_int8(torch.randn(8, 16))
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    int8.int8_matmul(x, w)
    assert int8._last.entry[0]() is x
    int8.int8_matmul(y, w)
    del x
    assert int8._last.entry[0]() is y
    del y
    assert not hasattr(int8._last, "entry")
