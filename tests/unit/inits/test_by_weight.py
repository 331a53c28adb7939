"""What the starts from the weight promise: which part of W the factors hold, and that the fresh adapter is neutral."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.registry import inits


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(9, 14, dtype=torch.float64)


@pytest.mark.parametrize(("name", "part"), [("pissa", slice(0, 4)), ("milora", slice(5, 9))])
def test_singular_starts_hold_their_part_of_the_weight(weight, name, part):
    A, B = inits[name].factors(weight, 4, 1.7, None)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    expected = U[:, part] @ torch.diag(S[part]) @ Vh[part]
    torch.testing.assert_close(1.7 * B @ A, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-12)  # the values are shared evenly


def test_olora_has_orthonormal_columns(weight):
    A, B = inits["olora"].factors(weight, 4, 1.7, None)
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(B @ A, B @ B.T @ weight, rtol=0, atol=1e-12)


def test_orthogonal_starts_at_zero_with_both_factors_alive(weight):
    A, B = inits["orthogonal"].factors(weight, 6, 1.0, None)
    assert A.abs().min() > 0
    assert B.abs().min() > 0
    assert float((B @ A).abs().max()) < 1e-14
    with pytest.raises(dw.errors.ConfigError, match="rank=5 is odd, use 6"):
        dw.attach(nn.Sequential(nn.Linear(8, 8)), dw.LoRA(rank=5, init="orthogonal"))


@pytest.mark.parametrize("name", ["pissa", "milora", "olora"])
def test_a_rank_above_the_weights_is_filled_up(weight, name):
    A, B = inits[name].factors(weight, 12, 1.0, None)
    assert A.shape == (12, 14)
    assert B.shape == (9, 12)
    torch.testing.assert_close(B @ A, weight, rtol=0, atol=1e-12)
    assert A[9:].abs().min() > 0, "rows of zeros could never learn"


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "orthogonal", "kaiming", "gaussian/rank"])
def test_stacks_of_weights_start_one_by_one(name):
    from deltaw.core.variant import Dense, Site

    torch.manual_seed(0)
    stack = torch.randn(3, 6, 10, dtype=torch.float64)
    delta = dw.LoRA(rank=2, init=name).create(Site((3, 6, 10), torch.float64), {})
    delta.start(Dense(stack))
    assert delta.A.shape == (3, 2, 10)
    assert delta.B.shape == (3, 6, 2)
    assert float(delta.delta_weight(stack).abs().max()) < 1e-13
    if name in ("pissa", "milora", "olora"):
        one, _ = inits[name].factors(stack[1], 2, 2.0, None)
        torch.testing.assert_close(delta.A[1].detach().abs(), one.abs())  # signs of singular vectors are free


@pytest.mark.parametrize("scaling", ["alpha/rank", "alpha/sqrt(rank)", "alpha"])
@pytest.mark.parametrize("variant", [dw.LoRA, dw.DoRA, dw.LoRAFA])
def test_what_is_kept_reads_the_same_over_the_plain_base(variant, scaling):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 5))
    x = torch.randn(4, 10)
    model = dw.attach(copy.deepcopy(base), variant(rank=3, alpha=5, scaling=scaling, init="pissa"), targets=["0", "2"])
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    kept = dw.get(model)
    plain = dw.install(copy.deepcopy(base), kept)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
    assert all(c.variant.rank == 6 and c.variant.init == "kaiming" for c in kept.changes.values())
    assert all("A0" not in c.tensors for c in kept.changes.values())


def test_the_start_is_in_checkpoints():
    model = dw.attach(nn.Sequential(nn.Linear(6, 6)), dw.LoRA(rank=2, init="pissa"))
    assert {"0.adapters.default.weight.A0", "0.adapters.default.weight.B0"} <= set(model.state_dict())


def test_a_16_bit_base_is_not_touched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    before = model[0].weight.clone()
    dw.attach(model, dw.LoRA(rank=4, init="pissa"))
    assert torch.equal(model[0].weight, before)
    assert model[0].deltas("default")["weight"].A.dtype == torch.float32
