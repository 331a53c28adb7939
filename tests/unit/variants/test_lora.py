"""LoRA, DoRA and LoRA-FA beyond the laws: stacks of weights, dropout of ranks and modules, what a file keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.adapter import Change
from deltaw.core.variant import Dense, Site


def shaken(delta: nn.Module, weight: torch.Tensor, seed: int = 1) -> nn.Module:
    delta.start(Dense(weight))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return delta.eval()


@pytest.mark.parametrize("variant", [dw.LoRA, dw.DoRA, dw.LoRAFA, dw.LoHa, dw.VeRA, dw.IA3])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_stack_of_weights_is_each_weight_on_its_own(variant, init):
    torch.manual_seed(0)
    stack = torch.randn(3, 6, 10, dtype=torch.float64)
    stack[1, 2] = 0  # a row without a direction
    options = {"rank": 2} if variant is not dw.IA3 else {}
    if issubclass(variant, dw.LoRA):
        options["init"] = init
    elif init != "kaiming":
        pytest.skip("no init to choose")
    v = variant(**options)
    whole = shaken(v.create(Site((3, 6, 10), torch.float64), {}), stack)
    dense = whole.delta_weight(stack)
    assert dense.shape == stack.shape
    assert torch.isfinite(dense).all()
    assert dense.abs().max() > 0.1
    for e in range(3):
        one = v.create(Site((6, 10), torch.float64), {}).eval()
        if init == "pissa":
            one.start(Dense(stack[e]))
        tensors = {n: (t if n in ("A", "B") and variant is dw.VeRA else t[e]) for n, t in whole.state_dict().items()}
        one.load_state_dict(tensors)
        one.prepare(Dense(stack[e]))
        torch.testing.assert_close(one.delta_weight(stack[e]), dense[e])
    kept, tensors = whole.kept()
    shape = kept.matrix_shape(tensors)
    assert all(found in (-1, true) for found, true in zip(shape, (3, 6, 10)))
    torch.testing.assert_close(Change(kept, tensors).delta_weight(stack), dense.detach())


def test_rank_dropout_leaves_directions_out_and_keeps_the_mean():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64)
    delta = shaken(dw.LoRA(rank=4, rank_dropout=0.25).create(Site((5, 7), torch.float64), {}), weight).train()
    directions = delta.B[:, :, None] * delta.A[None]  # (out, rank, in)
    whole = 2 * directions.sum(1)
    mean = torch.zeros_like(whole)
    for _ in range(400):
        change = delta.delta_weight(weight)
        fits = torch.linalg.lstsq((2 * directions).permute(0, 2, 1).reshape(35, 4), change.reshape(35, 1)).solution
        assert all(min(abs(f), abs(f - 1 / 0.75)) < 1e-9 for f in fits.flatten().tolist())
        mean += change / 400
    assert (mean - whole).norm() < 0.2 * whole.norm()
    torch.testing.assert_close(delta.eval().delta_weight(weight), whole)


@pytest.mark.parametrize(
    "variant",
    [
        dw.LoRA(rank=2, module_dropout=0.5),
        dw.DoRA(rank=2, module_dropout=0.5, init="pissa"),
        dw.LoHa(rank=2, module_dropout=0.5),
        dw.LoKr(rank=2, module_dropout=0.5),
    ],
    ids=repr,
)
def test_module_dropout_is_all_or_nothing_in_training_only(variant):
    torch.manual_seed(0)
    model = dw.attach(nn.Sequential(nn.Linear(7, 5, dtype=torch.float64)), variant)
    base = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(3, 7, dtype=torch.float64)
    without = base(x)
    whole = model.eval()(x)
    assert not torch.allclose(whole, without)
    model.train()
    seen = set()
    for _ in range(40):
        y = model(x)
        assert torch.allclose(y, whole) or torch.allclose(y, without)
        seen.add(torch.allclose(y, whole))
    assert seen == {True, False}
    with dw.merged(model):  # merged in training mode: the whole change, never a dropped one
        torch.testing.assert_close(model(x), whole)
    assert model[0].deltas("default")["weight"].training


def test_a_change_attached_to_a_model_in_eval_mode_is_in_eval_mode():
    model = dw.attach(nn.Sequential(nn.Linear(7, 5)).eval(), dw.LoHa(rank=2, rank_dropout=0.9))
    assert not model[0].deltas("default")["weight"].training


def test_lora_fa_never_trains_A_and_is_kept_as_a_plain_lora():
    torch.manual_seed(0)
    model = dw.attach(nn.Sequential(nn.Linear(7, 5)), dw.LoRAFA(rank=3, alpha=4))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.adapters.default.weight.B"]
    model(torch.randn(2, 7)).sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    adapter = dw.get(model)
    (change,) = adapter.changes.values()
    assert type(change.variant) is dw.LoRA
    assert change.variant == dw.LoRA(rank=3, alpha=4)
    x = torch.randn(2, 7)
    base = dw.detach(copy.deepcopy(model))
    assert torch.equal(dw.install(base, adapter)(x), model(x))


def test_options_out_of_range_are_named():
    for bad, word in [
        ({"rank_dropout": 1.0}, "rank_dropout"),
        ({"module_dropout": -0.1}, "module_dropout"),
        ({"init": "pisa"}, "did you mean 'pissa'"),
    ]:
        with pytest.raises(dw.errors.ConfigError, match=word):
            dw.LoRA(**bad)
