"""Dropout of a tensor of any shape: statistics, gradients of any order, and that nothing but the seed decides."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deltaw.ops import seeded
from deltaw.ops.seeded import Masked, seeded_dropout

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4, 5, 6, dtype=torch.float64),
    "channels last": lambda: torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6, dtype=torch.float64).T,
    "gaps": lambda: torch.randn(4, 6, dtype=torch.float64)[:, ::2],
    "expanded": lambda: torch.randn(1, 6, dtype=torch.float64).expand(4, 6),
    "a number": lambda: torch.randn((), dtype=torch.float64),
    "empty": lambda: torch.randn(0, 5, dtype=torch.float64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_kept_or_zero_and_the_gradient_has_the_same_mask(
    layout: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeded, "BLOCK", 7)  # several blocks
    torch.manual_seed(0)
    x = LAYOUTS[layout]().detach().requires_grad_(True)
    y = seeded_dropout(x, p)
    mask = torch.where(y == 0, 0.0, 1 / (1 - p) if p < 1 else 0.0).to(x.dtype)
    torch.testing.assert_close(y, x * mask)
    for g in (torch.randn_like(y), torch.randn(y.shape, dtype=y.dtype).contiguous()):
        (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
        torch.testing.assert_close(dx, g * mask)


def test_about_so_many_are_dropped() -> None:
    torch.manual_seed(0)
    y = seeded_dropout(torch.ones(64, 32, 50), 0.05)
    # 102,400 decisions: seven standard deviations of their mean
    assert abs(float((y == 0).float().mean()) - 0.05) < 0.005
    assert abs(float(y.mean()) - 1) < 0.005


def test_derivatives_of_second_order() -> None:
    seed = torch.tensor(5, dtype=torch.int32)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return Masked.apply(x**3, seed, 0.4, (4, 1))

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_the_seed_decides_and_a_recomputation_has_the_same() -> None:
    x = torch.ones(40, 50, requires_grad=True)
    torch.manual_seed(1)
    first, second = seeded_dropout(x, 0.5), seeded_dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, seeded_dropout(x, 0.5))
    assert not torch.equal(first, second)
    y = checkpoint(lambda x: seeded_dropout(x, 0.5).square(), x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, 2 * y)  # of 2² where kept: 2 · 2 · 2 · 1


def test_sixteen_bit_keeps_its_mean() -> None:
    torch.manual_seed(0)
    kept = seeded_dropout(torch.ones(1000, dtype=torch.bfloat16), 0.05)
    assert set(kept.tolist()) == {0.0, float(torch.tensor(1 / 0.95, dtype=torch.bfloat16))}
