"""Replacement in place: what fits, what it is turned into, what is refused."""

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import AdapterError, ConfigError, ModelError, UnknownName
from tests.laws.conftest import shaken

X = torch.randn(5, 4, dtype=torch.float64)


def model_with(variant, seed=1, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    dw.attach(model, variant, **{"targets": ["0", "2"], "name": "a", **options})
    return shaken(model, seed=seed)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (dw.LoRA(rank=4), dw.LoRA(rank=4)),
        (dw.LoRA(rank=4, dropout=0.5), dw.LoRA(rank=1, alpha=9, init="gaussian")),
        (dw.LoRA(rank=4, alpha=5), dw.LoRA(rank=3, scaling="alpha/sqrt(rank)")),
        (dw.LoRA(rank=4, init="pissa"), dw.LoRA(rank=2)),
        (dw.DoRA(rank=4), dw.DoRA(rank=2, alpha=3)),
        (dw.LoRA(rank=2, bias=True), dw.LoRA(rank=2, bias=True)),
        (dw.Full(), dw.Full()),
        (dw.IA3(), dw.IA3()),
        (dw.AdaLoRA(rank=4, target=2, total=9), dw.AdaLoRA(rank=4, target=3, alpha=3)),
        (dw.LoRAFA(rank=4), dw.LoRAFA(rank=2, alpha=3)),
    ],
    ids=repr,
)
def test_the_new_adapter_speaks_from_the_same_tensors(here, there):
    model, other = model_with(here).eval(), model_with(there, seed=7).eval()
    tensors = dict(model.named_parameters())
    dw.replace(model, "a", dw.get(other, "a"))
    torch.testing.assert_close(model(X), other(X))
    assert all(p is tensors[n] for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("there", "options", "message"),
    [
        (dw.LoRA(rank=5), {}, "rank at most 4"),
        (dw.DoRA(rank=4), {}, "same method"),
        (dw.AdaLoRA(rank=4, target=2), {}, "same method"),
        (dw.LoRA(rank=4), {"targets": ["0"]}, r"does not change 2\.weight"),
        (dw.LoRA(rank=4, bias=True), {}, r"also changes 0\.bias, 2\.bias"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(there, options, message):
    model, other = model_with(dw.LoRA(rank=4)), model_with(there, seed=7, **options)
    before = model(X)
    with pytest.raises(AdapterError, match=message):
        dw.replace(model, "a", dw.get(other, "a"))
    assert torch.equal(model(X), before)


def test_a_replaced_adalora_is_measured_and_reported_anew():
    variant = dw.AdaLoRA(rank=4, target=1, total=20)
    model, adapter = model_with(variant), dw.get(model_with(variant, seed=7), "a")
    model(X).sum().backward()
    dw.after_step(model, 1)
    for _ in range(3):  # each forward sees E changed, but by no step that went unreported
        dw.replace(model, "a", adapter)
        model(X).sum().backward()
    state = model.state_dict()
    assert not any(bool(t.any()) for n, t in state.items() if "importance_" in n or "spread_" in n)
    assert all(bool(t.all()) for n, t in state.items() if n.endswith("alive"))


def test_a_broken_tensor_late_in_the_adapter_changes_nothing():
    model, other = model_with(dw.LoRA(rank=4)), model_with(dw.LoRA(rank=4), seed=7)
    adapter = dw.get(other, "a")
    broken = dict(adapter.changes["2.weight"].tensors, B=torch.zeros(7, 4))
    change = dw.Change(dw.LoRA(rank=4), broken)
    before = model(X)
    with pytest.raises(AdapterError, match=r"2\.weight"):
        dw.replace(model, "a", adapter.replace(changes={**adapter.changes, "2.weight": change}))
    assert torch.equal(model(X), before)


def test_names_and_states():
    model = model_with(dw.LoRA(rank=4))
    adapter = dw.get(model, "a")
    with pytest.raises(UnknownName):
        dw.replace(model, "b", adapter)
    with dw.merged(model), pytest.raises(ModelError, match="unmerge"):
        dw.replace(model, "a", adapter)


def test_what_is_no_adapter_is_refused_by_name():
    model = model_with(dw.LoRA(rank=4))
    with pytest.raises(ConfigError, match=r"replace\('a'\) takes an Adapter.*found int"):
        dw.replace(model, "a", 3)


def test_what_attach_noted_is_still_told_by_the_summary():
    model = model_with(dw.LoRA(rank=4))
    before = dw.summary(model).matched
    assert before["a"] == {"targets='0'": 1, "targets='2'": 1}
    dw.replace(model, "a", dw.get(model_with(dw.LoRA(rank=4), seed=7), "a"))
    assert dw.summary(model).matched == before
