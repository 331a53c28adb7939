"""`check_gradients` finds what training would never reach."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltaw as dw
from deltaw.errors import ModelError, NonFinite, UnknownName


class Two(nn.Module):
    def __init__(self, skip: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.skip, self.reentrant = skip, reentrant

    def forward(self, x):
        y = self.first(x)
        if self.skip:
            return y
        return checkpoint(self.second, y.detach(), use_reentrant=True) if self.reentrant else self.second(y)


def test_a_sound_first_step_passes():
    model = dw.attach(Two(), dw.LoRA(rank=2))
    model(torch.randn(3, 4)).sum().backward()
    dw.check_gradients(model)
    dw.check_gradients(model, "default")


def test_a_layer_that_is_not_called_is_named():
    model = dw.attach(Two(skip=True), dw.LoRA(rank=2))
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(ModelError, match=r"2 of 4 trained tensors got no gradient: default: second\.weight\.A"):
        dw.check_gradients(model)


def test_reentrant_checkpointing_of_an_input_without_gradient():
    model = dw.attach(Two(reentrant=True), dw.LoRA(rank=2))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        model(torch.randn(3, 4))
    with pytest.raises(ModelError, match="enable_input_require_grads"):
        dw.check_gradients(model)


def test_zero_and_broken_gradients():
    model = dw.attach(Two(), dw.LoRA(rank=2))
    (0.0 * model(torch.randn(3, 4))).sum().backward()
    with pytest.raises(ModelError, match="all gradients are zero in 2 of 2"):
        dw.check_gradients(model)
    (float("nan") * model(torch.randn(3, 4))).sum().backward()
    with pytest.raises(NonFinite, match="default: first"):
        dw.check_gradients(model)


def test_only_what_speaks_is_looked_at():
    model = dw.attach(dw.attach(Two(), dw.LoRA(rank=2), name="a"), dw.LoRA(rank=2), name="b", targets="first")
    with dw.use(model, "a"):
        model(torch.randn(3, 4)).sum().backward()
        dw.check_gradients(model)
    with pytest.raises(ModelError, match="b: first"):
        dw.check_gradients(model)
    with pytest.raises(UnknownName, match="no adapter 'c'"):
        dw.check_gradients(model, ["c"])
    with dw.disabled(model), pytest.raises(ModelError, match="nothing is trained"):
        dw.check_gradients(model)


def test_trained_parameters_of_the_base():
    model = Two(skip=True)
    dw.attach(model, dw.LoRA(rank=2), targets="first", freeze=False)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(ModelError, match=r"base: second\.weight"):
        dw.check_gradients(model)
