"""Parts that were adapted on their own come under one roster; a verb on some of what a roster serves is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ModelError
from tests.laws.conftest import shaken

X = torch.randn(3, 8)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(torch.tanh(self.lin(x)))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Part(), Part(), nn.Linear(8, 4))


def in_parts() -> nn.Module:
    """x on the first part, y on the second, each attached to its part alone."""
    model = plain()
    for part, name in zip(model, "xy"):
        dw.attach(part, dw.LoRA(rank=2), ["lin"], name=name)
    return shaken(model)


def copied(how, model):
    return {"itself": lambda m: m, "copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}[how](
        model
    )


HOW = pytest.mark.parametrize("how", ["itself", "copied", "pickled"])


@HOW
def test_verbs_on_the_whole_leave_all_parts_speaking(how):
    model = copied(how, in_parts())
    expected = model(X)
    dw.attach(model, dw.LoRA(rank=2), ["2"], name="z", active=False)
    assert torch.equal(model(X), expected)
    assert {s.name for s in dw.adapters(model) if s.active} == {"x", "y"}
    dw.quantize(model, dw.Dense16(), targets=["2"], keep="memory")
    dw.dequantize(model)
    assert torch.equal(model(X), expected)
    report = dw.merge(model)
    assert report.names == ("x", "y")
    torch.testing.assert_close(model(X), expected)
    dw.unmerge(model)
    assert torch.equal(model(X), expected)
    dw.rename(model, "y", "w")
    dw.copy(model, "w", "v")
    assert torch.equal(model(X), expected)


@HOW
def test_detaching_from_the_whole_restores_what_was_frozen_in_the_parts(how):
    model = copied(how, in_parts())
    assert not any(p.requires_grad for p in model[0].norm.parameters())
    dw.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain().modules()]
    assert not any("deltaw" in attribute for m in model.modules() for attribute in m.__dict__)


@HOW
def test_a_part_that_is_quantised_is_dequantised_with_the_whole(how):
    model = in_parts()
    before = model[1].lin.weight.detach().clone()
    dw.quantize(model[1], dw.Int8(), targets=["lin"], keep="memory")
    model = copied(how, model)
    dw.merge(model)
    dw.unmerge(model)
    dw.dequantize(model)
    assert torch.equal(model[1].lin.weight, before)
    dw.detach(model)
    assert all(p.requires_grad for p in model.parameters())


@HOW
def test_a_model_inside_of_another_and_the_one_around_it_are_the_same_to_every_verb(how):
    for inner in (True, False):
        whole = plain()
        dw.attach(whole[0] if inner else whole, dw.LoRA(rank=2), ["0.lin" if not inner else "lin"])
        whole = copied(how, shaken(whole))
        given, other = (whole[0], whole) if inner else (whole, whole[0])
        expected = whole(X)
        dw.attach(other, dw.LoRA(rank=2), ["lin"] if not inner else ["0.lin"], name="second", active=False)
        assert torch.equal(whole(X), expected)
        dw.merge(other)
        dw.unmerge(other)
        assert torch.equal(whole(X), expected)
        dw.merge(given)
        with pytest.raises(ModelError, match=r"given to dw\.merge"):
            dw.unmerge(other)
        dw.unmerge(given)
        dw.detach(other)
        if inner or how == "itself":
            assert all(p.requires_grad for p in whole.parameters())


def test_a_verb_on_a_part_is_refused_and_changes_nothing():
    model = shaken(dw.attach(plain(), dw.LoRA(rank=2), ["lin"]))
    expected = model(X)
    for verb in (
        lambda m: dw.detach(m),
        lambda m: dw.merge(m),
        lambda m: dw.attach(m, dw.LoRA(rank=2), ["lin"], name="b"),
        lambda m: dw.quantize(m, dw.Int8(), targets=["lin"]),
        lambda m: dw.rename(m, "default", "c"),
        lambda m: dw.load(m, dw.get(m), name="b"),
    ):
        with pytest.raises(ModelError, match=r"Part holds some of the layers that carry 'default', not all: 1 more"):
            verb(model[0])
    assert torch.equal(model(X), expected)
    dw.attach(model[2:], dw.LoRA(rank=2), ["2"], name="head")
    dw.detach(model)
    assert type(model[2]) is nn.Linear


def test_a_layer_that_was_taken_out_of_the_model_does_not_count():
    model = shaken(dw.attach(plain(), dw.LoRA(rank=2), ["0.lin", "2"]))
    model[2].itself = [model[2]]  # as a bound forward does: it lives until the garbage collector comes
    model[2] = nn.Linear(8, 4)
    dw.detach(model)
    assert type(model[0].lin) is nn.Linear


def test_two_models_that_share_a_layer_are_adapted_together():
    trunk = nn.Linear(8, 8)
    actor, critic = nn.Sequential(trunk, nn.Linear(8, 3)), nn.Sequential(trunk, nn.Linear(8, 1))
    dw.attach(actor, dw.LoRA(rank=2), ["0", "1"], name="actor")
    with pytest.raises(ModelError, match="share layers are adapted together"):
        dw.attach(critic, dw.LoRA(rank=2), ["0", "1"], name="critic")
    actor(X).sum().backward()
    assert sum(p.grad is not None for n, p in actor.named_parameters() if ".actor." in n) == 4
    dw.detach(actor)
    assert all(p.requires_grad for p in actor.parameters())
    dw.attach(nn.ModuleList([actor, critic]), dw.LoRA(rank=2), ["0", "1"])
    with pytest.raises(ModelError, match="share layers"):
        dw.detach(actor)
    dw.detach(nn.ModuleList([actor, critic]))
    assert all(p.requires_grad for p in [*actor.parameters(), *critic.parameters()])


def test_a_shared_layer_that_nobody_changes_stays_frozen_until_the_one_who_froze_it_leaves():
    trunk = nn.Linear(8, 8)
    actor, critic = nn.Sequential(trunk, nn.Linear(8, 3)), nn.Sequential(trunk, nn.Linear(8, 1))
    dw.attach(actor, dw.LoRA(rank=2), ["1"])
    dw.attach(critic, dw.LoRA(rank=2), ["1"])
    dw.detach(critic)
    assert not trunk.weight.requires_grad
    dw.detach(actor)
    assert trunk.weight.requires_grad


def test_parts_that_contradict_each_other_are_refused_until_one_says_who_speaks():
    model = plain()
    for part in model[:2]:
        dw.attach(part, dw.LoRA(rank=2), ["lin"], name="x")
    shaken(model)
    dw.activate(model[1], None)
    expected = model(X)
    with pytest.raises(ModelError, match=r"'x' is not active alike.*dw\.activate\(model, \['x'\]\)"):
        dw.merge(model)
    assert torch.equal(model(X), expected)
    with dw.use(model[1], "x"), pytest.raises(ModelError, match="leave the context first"):
        dw.detach(model)
    dw.activate(model, "x")
    both = model(X)
    dw.attach(model, dw.LoRA(rank=2), ["2"], name="y", active=False)
    assert torch.equal(model(X), both)
    model = in_parts()
    dw.merge(model[0])
    with pytest.raises(ModelError, match="merged into parts"):
        dw.unmerge(model)
    dw.unmerge(model[0])
    dw.merge(model)


def test_parts_do_not_forget_the_layers_that_no_call_has_reached():
    model = plain()
    for part, name in zip(model, "xy"):
        dw.attach(part, dw.LoRA(rank=2), ["lin"], name=name)
    dw.attach(model, dw.LoRA(rank=2), ["2"], name="z", active=False)
    model[0].forward = lambda x: x
    model[1].forward = lambda x: x
    with pytest.warns(UserWarning, match=r"'0.lin', '1.lin' of Sequential carry a change"):
        model(X)
