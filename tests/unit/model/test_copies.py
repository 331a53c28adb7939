"""add, copy, rename, delete, status."""

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ConfigError, ModelError, NameTaken, UnknownName
from tests.laws.conftest import shaken


def model_with(*names, variant=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for name in names:
        dw.attach(model, variant or dw.LoRA(rank=2), targets=["0", "2"], name=name)
    return shaken(model)


X = torch.randn(5, 4)


def test_copy_has_its_own_tensors_and_the_same_values():
    model = model_with("a", variant=dw.DoRA(rank=2))
    expected = model(X)
    dw.copy(model, "a", "b")
    assert [s.name for s in dw.adapters(model)] == ["a", "b"]
    assert dw.status(model, "a").active
    assert not dw.status(model, "b").active
    assert dw.status(model, "b").trainable
    with dw.use(model, "b"):
        assert torch.equal(model(X), expected)
    with torch.no_grad():
        model[0].deltas("b")["weight"].B.zero_()
    assert torch.equal(model(X), expected)


def test_copy_of_tensors_that_layers_share():
    model = model_with("a", variant=dw.VeRA(rank=2))
    dw.copy(model, "a", "b")
    with dw.use(model, "a"):
        expected = model(X)
    with dw.use(model, "b"):
        torch.testing.assert_close(model(X), expected)
    shared = [t.data_ptr() for n, t in model.named_buffers() if ".a." in n]
    copied = [t.data_ptr() for n, t in model.named_buffers() if ".b." in n]
    assert len(set(copied)) == len(set(shared))
    assert set(copied).isdisjoint(shared)


def test_rename_keeps_order_tensors_and_activity():
    model = model_with("a", "b", "c")
    dw.activate(model, {"b": 0.5, "a": 1.0})
    expected, tensors = model(X), dict(model[0].deltas("b")["weight"].named_parameters())
    dw.rename(model, "b", "better")
    assert [s.name for s in dw.adapters(model)] == ["a", "better", "c"]
    assert torch.equal(model(X), expected)
    assert model[0].deltas("better")["weight"].A is tensors["A"]
    assert dw.status(model, "better").weight == 0.5
    with dw.use(model, "a"), pytest.raises(ModelError, match="leave the context"):
        dw.rename(model, "a", "z")
    dw.detach(model)
    assert type(model[0]) is nn.Linear


def test_add_and_delete():
    model, other = model_with("a"), model_with("a")
    shaken(other, seed=4)
    before = model(X)
    dw.add(model, dw.get(other, "a"), "b")
    dw.add(model, dw.LoRA(rank=1), "c", targets=["2"])
    assert torch.equal(model(X), before)
    with dw.use(model, "b"):
        torch.testing.assert_close(model(X), other(X))
    dw.delete(model, "b")
    assert [s.name for s in dw.adapters(model)] == ["a", "c"]
    with pytest.raises(ConfigError, match="found str"):
        dw.add(model, "b", "b")


def test_refusals_change_nothing():
    model = model_with("a", "b")
    for wrong in (lambda: dw.copy(model, "c", "d"), lambda: dw.rename(model, "c", "d"), lambda: dw.delete(model, "c")):
        with pytest.raises(UnknownName, match="no adapter 'c'"):
            wrong()
    for wrong in (lambda: dw.copy(model, "a", "b"), lambda: dw.rename(model, "a", "b")):
        with pytest.raises(NameTaken, match="'b' already"):
            wrong()
    with pytest.raises(ConfigError, match="letters"):
        dw.copy(model, "a", "../b")
    with dw.merged(model, "a"), pytest.raises(ModelError, match="unmerge"):
        dw.copy(model, "a", "c")
    with pytest.raises(UnknownName):
        dw.status(model, "c")
    assert [s.name for s in dw.adapters(model)] == ["a", "b"]


@pytest.mark.parametrize("context", [lambda m: dw.use(m, "a"), dw.disabled, lambda m: dw.rows(m, ["a", None])])
@pytest.mark.parametrize("verb", [lambda m: dw.delete(m, "a"), dw.detach, lambda m: dw.rename(m, "a", "c")])
def test_no_adapter_is_taken_away_from_a_context_that_may_name_it(context, verb):
    model = model_with("a", "b")
    expected = model(X)
    with context(model), pytest.raises(ModelError, match="leave the context first"):
        verb(model)
    assert torch.equal(model(X), expected)
    verb(model)
    assert "a" not in [s.name for s in dw.adapters(model)]
