"""Models that are unlike most: parametrised, lazy and scripted layers, modules without a forward, odd attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import deltaw as dw
from deltaw.core.host import Host
from deltaw.errors import ModelError, TargetError
from tests.laws.conftest import shaken

X = torch.randn(3, 4, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original0"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "weight_norm, old": (weight_norm, "weight_g"),
    "spectral_norm, old": (spectral_norm, "weight_orig"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_is_refused_with_what_it_is_computed_from(how):
    norm, source = COMPUTED[how]
    model = Model(nn.Linear(4, 4), norm(nn.Linear(4, 4)))
    with pytest.raises(TargetError, match=r"'layers.1'.*computed from") as error:
        dw.attach(model, dw.LoRA(rank=2))
    assert source in str(error.value)
    assert not any(isinstance(m, Host) for m in model.modules())
    dw.attach(model, dw.LoRA(rank=2), exclude=["layers.1"])


def test_a_computed_weight_is_trained_in_full(tmp_path):
    model = Model(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))).double()
    base = model(X)
    dw.attach(model, dw.LoRA(rank=2), ["layers.0"], train=["layers.1"])
    assert torch.equal(model(X), base)
    shaken(model)
    out = model(X)
    out.sum().backward()
    dw.check_gradients(model)
    with dw.merged(model):
        torch.testing.assert_close(model(X), out)
    dw.save(model, tmp_path / "a")
    dw.detach(model)
    assert torch.equal(model(X), base)
    assert torch.equal(dw.load(model, tmp_path / "a")(X), out)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Model(nn.Linear(4, 4), nn.LazyLinear(4)), "LazyLinear have no shape yet; run the model once"),
        (lambda: torch.jit.script(Model(nn.Linear(4, 4))), "Model is scripted or traced"),
        (lambda: Model(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))), "Linear is scripted or traced"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_layers_that_cannot_be_adapted_yet_or_any_more(model, words):
    model = model()
    with pytest.raises(ModelError, match=words):
        dw.attach(model, dw.LoRA(rank=2), ["layers.0"])


def test_inside_of_inference_mode_nothing_is_attached():
    model = Model(nn.Linear(4, 4))
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode"):
        dw.attach(model, dw.LoRA(rank=2))
    assert not any(isinstance(m, Host) for m in model.modules())


def test_a_layer_without_parameters_that_looks_like_a_container():
    model = Model(nn.Linear(4, 4), nn.Identity())
    with pytest.raises(TargetError, match=r"'layers.1', a Identity, which has no parameter that LoRA could adapt"):
        dw.attach(model, dw.LoRA(rank=2), ["layers.1"])


class Raw(nn.Module):
    """Parameters in containers that have no forward, and a module of which another method is called."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ParameterDict({"k": torch.randn(4, 4)})
        self.listed = nn.ParameterList([torch.randn(4, 4)])
        self.bare = nn.Module()
        self.bare.register_parameter("w", nn.Parameter(torch.randn(4, 4)))
        self.other = Projection()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.listed:
            x = x @ w
        return self.other.project(x @ self.named["k"] @ self.bare.w)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@pytest.mark.parametrize("target", ["named.k", "listed.0", "bare.w", "other.w"])
@pytest.mark.parametrize("how", ["adapted", "trained in full"])
def test_parameters_of_modules_that_are_never_called_take_effect(target, how):
    model = Raw().double()
    base = model(X)
    if how == "adapted":
        dw.attach(model, dw.LoRA(rank=2), [target])
    else:
        dw.attach(model, {target: dw.Full()})
    assert torch.equal(model(X), base)
    shaken(model)
    out = model(X)
    assert not torch.allclose(out, base)
    with dw.merged(model):
        torch.testing.assert_close(model(X), out)
    dw.detach(model)
    assert torch.equal(model(X), base)
    assert type(model) is Raw


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named, self.first = nn.ParameterDict({"k": torch.randn(4, 4)}), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) @ self._modules["named"]["k"]


def test_parameters_that_are_reached_by_ways_unknown_are_refused_and_nothing_changes():
    model = Hidden()
    with pytest.raises(TargetError, match=r"'named' .ParameterDict. has no forward and is never called"):
        dw.attach(model, dw.LoRA(rank=2), ["first", "named.k"])
    assert not any(isinstance(m, Host) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
