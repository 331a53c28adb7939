"""Tied weights: one change per storage, applied once, transposed for the other use, merged once (PEFT fault 6)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, ConfigError, ModelError
from tests.laws.conftest import shaken

VARIANTS = [dw.LoRA(rank=2), dw.LoRA(rank=9), dw.DoRA(rank=2), dw.Full()]


class Language(nn.Module):
    """Embedding and output head share one parameter."""

    def __init__(self, vocabulary: int = 11, width: int = 6, how: str = "parameter") -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.double()
        if how == "parameter":
            self.head.weight = self.embed.weight
        elif how == "storage":
            self.head.weight = nn.Parameter(self.embed.weight.detach())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


IDS = torch.tensor([[1, 4, 1], [0, 10, 4]])


def tied(**options) -> Language:
    torch.manual_seed(0)
    return Language(**options).eval()


def with_delta(model: Language) -> torch.Tensor:
    """What the plain model gives with W + ΔW in its one parameter."""
    plain = tied()
    with torch.no_grad():
        plain.embed.weight.copy_(model.embed.changed("weight"))
        plain.body.load_state_dict({k: v for k, v in model.body.state_dict().items() if "adapters" not in k})
    return plain(IDS)


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"], ["head", "embed"]], ids=str)
@pytest.mark.parametrize("how", ["parameter", "storage"])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_one_change_for_both_uses(variant, how, targets):
    model = tied(how=how)
    before = model.embed.weight.clone()
    out = model(IDS)
    dw.attach(model, variant, targets=targets)
    assert torch.equal(model(IDS), out)
    assert dw.adapters(model)[0].weights == 1
    shaken(model)
    torch.testing.assert_close(model(IDS), with_delta(model), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.embed.changed("weight"), model.head.changed("weight"))

    changed = model(IDS)
    report = dw.merge(model)
    assert len(report.weights) == 1
    torch.testing.assert_close(model(IDS), changed, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.embed.weight, model.head.weight)
    dw.unmerge(model)
    assert torch.equal(model.embed.weight, before)
    assert torch.equal(model.head.weight, before)
    dw.detach(model)
    assert torch.equal(model(IDS), out)
    assert type(model.head) is nn.Linear
    assert type(model.embed) is nn.Embedding
    if how == "parameter":
        assert model.head.weight is model.embed.weight


def test_a_square_weight_is_still_transposed_for_the_other_use():
    torch.manual_seed(0)
    model = Language(6, 6).eval()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["embed"]))
    ids = torch.tensor([[1, 5, 0]])
    out = model(ids)
    dw.merge(model)
    torch.testing.assert_close(model(ids), out, rtol=1e-12, atol=1e-12)


def test_gradients_of_both_uses_reach_the_one_change():
    model = tied()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["embed"]))
    delta = model.embed.deltas("default")["weight"]
    mine = torch.autograd.grad(model(IDS).square().sum(), [delta.A, delta.B])
    weight = model.embed.changed("weight")
    x = torch.tanh(nn.functional.linear(nn.functional.embedding(IDS, weight), model.body.weight, model.body.bias))
    theirs = torch.autograd.grad(nn.functional.linear(x, weight).square().sum(), [delta.A, delta.B])
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_adapter_as_a_value_says_what_is_tied_and_goes_back():
    model = tied()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["embed"]))
    out = model(IDS)
    adapter = dw.get(model)
    assert adapter.changes["embed.weight"].tied == ("head.weight",)
    fresh = tied()
    dw.install(fresh, adapter)
    assert torch.equal(fresh(IDS), out)

    untied = tied(how="apart")
    with pytest.raises(AdapterError, match=r"one parameter with 'head\.weight'"):
        dw.install(untied, adapter)


def test_a_one_sided_adapter_stays_one_sided_and_is_not_merged():
    model = tied()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["embed"]))
    change = dw.get(model).changes["embed.weight"]
    one_sided = Adapter({"embed.weight": type(change)(change.variant, change.tensors, change.layer, change.shape)})
    fresh = tied()
    dw.install(fresh, one_sided)
    assert torch.equal(
        fresh.head.changed("weight") if hasattr(fresh.head, "changed") else fresh.head.weight, tied().head.weight
    )
    assert not torch.equal(fresh(IDS), model(IDS))
    with pytest.raises(ModelError, match=r"'embed\.weight' and 'head\.weight' are one parameter.*untie"):
        dw.merge(fresh)
    fresh.head.weight = nn.Parameter(fresh.head.weight.clone())
    out = fresh(IDS)
    dw.merge(fresh)
    torch.testing.assert_close(fresh(IDS), out, rtol=1e-12, atol=1e-12)


def test_two_wishes_for_one_parameter_are_refused():
    with pytest.raises(ConfigError, match=r"'head\.weight', which is the same parameter as 'embed\.weight'"):
        dw.attach(tied(), {"embed": dw.LoRA(rank=2), "head": dw.LoRA(rank=3)})


def test_a_second_adapter_keeps_the_ties_of_the_first():
    model = tied()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["embed"], name="a"), 1)
    a = model(IDS)
    shaken(dw.attach(model, dw.LoRA(rank=1), targets=["head"], name="b", freeze=False), 2)
    with dw.use(model, "a"):
        first = model(IDS)
    dw.detach(model, "b")
    with dw.use(model, "a"):
        torch.testing.assert_close(model(IDS), first)
    assert first.shape == a.shape
    twin = copy.deepcopy(model)
    with dw.use(twin, "a"):
        assert torch.equal(twin(IDS), first)
    assert twin.head.adapters.tied["a"]["weight"][0] is twin.embed


def test_layers_of_one_class_that_share_a_weight():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    model, x = Shared().double(), torch.randn(2, 5).double()
    shaken(dw.attach(model, dw.DoRA(rank=2), targets=["first"]))
    out = model(x)
    dw.merge(model)
    torch.testing.assert_close(model(x), out, rtol=1e-12, atol=1e-12)
