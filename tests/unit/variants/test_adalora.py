"""AdaLoRA's allocation: the budget, what is cut, what a checkpoint and a file keep, and that it cannot be forgotten."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw


def model_of(**options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5))
    return dw.attach(base, dw.AdaLoRA(**{"rank": 4, "target": 1, "total": 12, **options}), targets=["0", "2"])


def deltas(model: nn.Module) -> list:
    return [model.get_submodule(n).deltas("default")["weight"] for n in ("0", "2")]


def alive(model: nn.Module) -> int:
    return sum(int((d.E != 0).sum()) for d in deltas(model))


def train(model: nn.Module, steps: range, optimizer=None, report=True):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(3)
    x, goal = torch.randn(16, 9, generator=generator), torch.randn(16, 5, generator=generator)
    for step in steps:
        nn.functional.mse_loss(model(x), goal).backward()
        optimizer.step()
        if report:
            dw.after_step(model, step)
        optimizer.zero_grad()
    return optimizer


def test_the_budget_falls_along_the_cubic_curve_to_the_target():
    v = dw.AdaLoRA(rank=8, target=2, warmup=10, settle=20, total=110)
    found = [v.budget(step, 3) for step in range(1, 111)]
    assert found[:10] == [24] * 10
    assert found[89:] == [6] * 21
    assert found == sorted(found, reverse=True)
    assert found[49] == int(18 * 0.5**3 + 6)


def test_training_ends_at_the_target_and_stays_there():
    model = model_of(settle=4)
    optimizer = train(model, range(1, 9))
    assert alive(model) == 2
    where = [d.E != 0 for d in deltas(model)]
    train(model, range(9, 13), optimizer)
    assert all(torch.equal(d.E != 0, w) for d, w in zip(deltas(model), where))


def test_forgetting_after_step_is_refused_on_the_third_forward():
    model = model_of()
    with pytest.raises(dw.errors.ModelError, match=r"dw.after_step\(model, step\) after every"):
        train(model, range(1, 5), report=False)
    model.eval()(torch.randn(2, 9))


def test_accumulating_gradients_and_putting_tensors_in_place_is_no_step():
    model = model_of()
    x = torch.randn(2, 9)
    for _ in range(5):
        model(x).sum().backward()
    with torch.no_grad():
        for d in deltas(model):
            d.E.copy_(torch.ones(4))
    for _ in range(5):
        model(x).sum().backward()


def test_a_gradient_that_is_gone_and_a_missing_total_are_named():
    model = model_of()
    with pytest.raises(dw.errors.ModelError, match=r"before optimizer\.zero_grad"):
        dw.after_step(model, 1)
    model = model_of(total=None)
    with pytest.raises(dw.errors.ModelError, match=r"AdaLoRA\(total=...\)"):
        train(model, range(1, 2))


def test_a_resumed_allocation_is_the_uninterrupted_one_to_the_bit():
    straight = model_of()
    train(straight, range(1, 13))
    first = model_of()
    optimizer = train(first, range(1, 6))
    kept, kept_optimizer = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert "0.adapters.default.weight.importance_E" in kept
    second = model_of()
    second.load_state_dict(kept)
    again = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=0.05)
    again.load_state_dict(kept_optimizer)
    train(second, range(6, 13), again)
    for a, b in zip(deltas(straight), deltas(second)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_file_keeps_the_three_factors_and_trains_on():
    model = model_of()
    train(model, range(1, 13))
    adapter = dw.get(model)
    assert all(set(c.tensors) == {"A", "B", "E"} for c in adapter.changes.values())
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5))
    again = dw.install(base, adapter, trainable=True)
    x = torch.randn(3, 9)
    assert torch.equal(again.eval()(x), model.eval()(x))
    train(again.train(), range(1, 3))
    frozen = dw.install(dw.detach(again), adapter)
    dw.after_step(frozen, 1)  # nothing of it is trained: nothing to allocate


def test_options_that_contradict_each_other():
    for bad, word in [
        ({"target": 13}, "above rank=12"),
        ({"total": 10, "warmup": 5, "settle": 5}, "leave none between"),
        ({"warmup": -1}, "warmup=-1"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0"),
    ]:
        with pytest.raises(dw.errors.ConfigError, match=word):
            dw.AdaLoRA(**bad)
