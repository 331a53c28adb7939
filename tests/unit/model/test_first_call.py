"""The model's first call names adapted layers that it never reaches (law 7), once, and leaves no trace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import deltaw as dw


class Model(nn.Module):
    """`far` is read by a way that no code tells; `never` is not used; `both` is used."""

    def __init__(self, hidden: bool = True) -> None:
        super().__init__()
        self.both, self.far, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.hidden = hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.get_submodule("far") if self.hidden else self.far
        return self.both(x) @ layer.weight if self.hidden else self.both(self.far(self.never(x)))


X = torch.randn(2, 4)


def quiet(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


def test_layers_that_are_never_called_are_named_once():
    model = Model()
    dw.attach(model, dw.LoRA(rank=2))
    with pytest.warns(UserWarning, match="'far', 'never' of Model carry a change, but were not called"):
        model(X)
    quiet(model)
    assert not model._forward_hooks


@pytest.mark.parametrize("how", [torch.no_grad, torch.enable_grad])
def test_called_layers_are_not(how):
    model = Model(hidden=False)
    dw.attach(model, dw.LoRA(rank=2))
    with how():
        quiet(model)


def test_a_second_adapter_is_looked_at_too_and_the_first_no_more():
    model = Model()
    dw.attach(model, dw.LoRA(rank=2), ["both"], name="a")
    quiet(model)
    dw.attach(model, dw.LoRA(rank=2), ["both", "never"], name="b")
    with pytest.warns(UserWarning, match="'never' of Model"):
        model(X)


def test_a_loaded_adapter_is_looked_at():
    model = Model()
    dw.attach(model, dw.LoRA(rank=2), ["never"])
    other = dw.install(Model(), dw.get(model))
    with pytest.warns(UserWarning, match="'never' of Model"):
        other(X)


def test_what_a_fast_path_or_attention_reads_counts_as_called():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    dw.attach(model, dw.LoRA(rank=2), [nn.Linear, nn.MultiheadAttention])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 4))


def test_a_call_in_which_the_adapter_is_silent_tells_nothing():
    model = Model()
    dw.attach(model, dw.LoRA(rank=2), ["never"])
    with dw.disabled(model):
        quiet(model)
    with pytest.warns(UserWarning, match="'never' of Model"):
        model(X)
    quiet(model)
    assert not model._forward_hooks


def test_copies_and_detach_leave_no_hook():
    model = Model()
    dw.attach(model, dw.LoRA(rank=2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        quiet(twin)
        assert not twin._forward_hooks
    dw.detach(model)
    assert not model._forward_hooks
    quiet(model)


def test_compiled_models_are_left_alone():
    model = Model()
    dw.attach(model, dw.LoRA(rank=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled(X)
    assert not [w for w in said if "carry a change" in str(w.message)]
    torch._dynamo.reset()


class Tied(nn.Module):
    """T5's way: the layer that holds the weight is not called, one that is tied to it may be."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.shared, self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner.weight = self.shared.weight
        self.called = called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if self.called else self.other(x)


@pytest.mark.parametrize("called", [True, False])
def test_a_layer_that_acts_through_a_tied_one(called):
    model = Tied(called)
    dw.attach(model, dw.LoRA(rank=2), ["shared"])
    if called:
        quiet(model)
    else:
        with pytest.warns(UserWarning, match="^'shared' of Tied carry a change"):
            model(X)
    assert not model._forward_hooks
