"""Products by oneDNN: the same numbers as F.linear's up to roundings, a fresh adapter's to the bit, and the rule."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deltaw.core.variant import LowRank
from deltaw.ops import adapted_linear, adapted_linear_reference, cpu_thin, matmul

present = pytest.mark.skipif(
    not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN for every 32-bit product, however small, on any processor; the products that it made."""
    made: list[tuple[int, ...]] = []
    asked = matmul.by_onednn

    def noted(x: torch.Tensor, weight: torch.Tensor) -> bool:
        answer = asked(x, weight)
        if answer:
            made.append((*x.shape, weight.shape[0]))
        return answer

    monkeypatch.setattr(matmul, "WORTH", 1)
    monkeypatch.setattr(matmul, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(matmul, "by_onednn", noted)
    monkeypatch.setattr(cpu_thin, "library", lambda: "not here: these tests are of torch's own operations")
    return made


@present
@pytest.mark.parametrize(
    ("rows", "columns", "out"), [(1, 1, 1), (3, 41, 9), (17, 384, 8), (300, 8, 33), (64, 200, 130)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_every_memory_order(rows: int, columns: int, out: int, bias: bool, taken: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(rows, columns), torch.randn(out, columns)
    b = torch.randn(out) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    bound = (columns + 2) * 2.0**-24 * (x.abs().double() @ weight.abs().double().t() + (0 if b is None else b.abs()))
    for left in (x, x.t().contiguous().t(), torch.randn(rows, 2 * columns)[:, columns:].copy_(x)):
        for right in (weight, weight.t().contiguous().t(), torch.randn(2 * out, columns)[::2].copy_(weight)):
            y = matmul.linear(left, right, b)
            assert y.is_contiguous()
            assert ((y - exact).abs() <= bound).all(), "one rounding for each product and each sum"
    assert len(taken) == 9


@present
def test_rows_that_are_not_finite_stay_alone(taken: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(40, 30), torch.randn(20, 30)
    clean = matmul.linear(x, weight)
    x[7] = torch.nan
    spoiled = matmul.linear(x, weight)
    assert spoiled[7].isnan().all()
    keep = torch.arange(40) != 7
    assert torch.equal(spoiled[keep], clean[keep])
    assert len(taken) == 2


@present
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_against_float64(gain: bool, dropout: float, taken: list[tuple[int, ...]]) -> None:
    shapes = ((5, 40, 24), (16, 24), (16,), (4, 24), (16, 4), (16,))
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g).mul_(0.5).requires_grad_() for s in shapes]
    results = []
    for op, dtype in ((adapted_linear, torch.float32), (adapted_linear_reference, torch.float64)):
        torch.manual_seed(3)
        x, weight, bias, A, B, c = (t.to(dtype) for t in tensors)
        y = op(x, weight, bias, [LowRank(A, B, 2.0, c if gain else None, dropout)], training=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors[: 6 if gain else 5])])
    for found, expected in zip(*results):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert len(taken) >= 5, "base, ∂x, ∂W and the thin ones"


@present
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_takes_the_fast_product(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = torch.randn(9, 50, 24), torch.randn(16, 24), torch.randn(16)
    B, gain = torch.zeros(16, 4), torch.zeros(16)
    for term in (LowRank(torch.randn(4, 24), B, 2.0), LowRank(torch.randn(4, 24), B, 2.0, gain, 0.1)):
        assert torch.equal(adapted_linear(x, weight, bias, [term], training=True), F.linear(x, weight, bias))
    assert (450, 24, 16) not in taken
    gain[3] = 0.5
    adapted_linear(x, weight, bias, [LowRank(torch.randn(4, 24), B, 2.0, gain)], training=True)
    assert (450, 24, 16) in taken


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "mkl_is_slow", lambda: True)
    large, small = torch.randn(300, 100), torch.randn(300, 3)
    weight = torch.randn(100, 100)
    assert matmul.by_onednn(large, weight)
    assert not matmul.by_onednn(small, torch.randn(3, 3))
    assert not matmul.by_onednn(large.double(), weight.double())
    assert not matmul.by_onednn(large.bfloat16(), weight.bfloat16())
    assert not matmul.by_onednn(large.to("meta"), weight.to("meta"))
    assert not matmul.by_onednn(large.as_subclass(type("Sub", (torch.Tensor,), {})), weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not matmul.by_onednn(large, weight)
        assert torch.equal(matmul.linear(large, weight), F.linear(large, weight))
    monkeypatch.setattr(matmul, "mkl_is_slow", lambda: False)
    assert not matmul.by_onednn(large, weight)


@present
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_traced_by_torchscript_for_any_number_of_rows(taken: list[tuple[int, ...]], grad: bool) -> None:
    weight, term = torch.randn(16, 24), LowRank(torch.randn(4, 24), torch.randn(16, 4), 2.0)

    def run(x: torch.Tensor) -> torch.Tensor:
        return adapted_linear(x, weight, None, [term], training=False)

    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(run, (torch.randn(2, 9, 24),))
    x = torch.randn(3, 50, 24)
    torch.testing.assert_close(traced(x), run(x))
    assert (150, 24, 16) in taken, "which TorchScript cannot write down"
