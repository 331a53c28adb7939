"""Subclasses with a forward of their own: how each is adapted, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import TargetError
from deltaw.layers import own_forward, ways
from tests.laws.conftest import Wrapped, shaken


class Ignoring(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.out_features] * 2


class SuperAndValues(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) - self.weight.mean()


class Helped(nn.Linear):
    """A method of its own reads the weight."""

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shortcut(x)


class ByName(nn.Linear):
    """The weight is read by a name in a string."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + getattr(self, "weight").mean()  # noqa: B009


class Divided(nn.Embedding):
    """A method of its own reads the weight of an embedding."""

    def size(self) -> torch.Tensor:
        return self.weight.norm()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) / self.size()


class Twice(own_forward.ScaledLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "way"),
    [
        (lambda: own_forward.CastingLinear(3, 4), "added"),
        (lambda: own_forward.ScaledLinear(3, 4), "beneath"),
        (lambda: Twice(3, 4), "beneath"),
        (lambda: own_forward.NormedLinear(3, 4), "changed"),
        (lambda: Helped(3, 4), "changed"),
        (lambda: ByName(3, 4), "changed"),
        (lambda: Ignoring(3, 2), "unused"),
        (lambda: own_forward.CastingLinear(3, 4, device="meta"), "added"),
        (lambda: nn.Linear(3, 4), None),
    ],
)
def test_the_way_is_found_by_reading_and_by_trying(layer, way):
    ways._ways.clear()
    before = torch.get_rng_state()
    made = layer()
    state = torch.get_rng_state()
    assert ways.way_of(made, nn.Linear) == way
    assert torch.equal(torch.get_rng_state(), state)
    assert before is not state


class Switched(nn.Linear):
    """A normed or a plain product, as the instance says."""

    def __init__(self, normed: bool, factor: float = 1.0) -> None:
        super().__init__(6, 5)
        self.normed, self.factor = normed, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.normalize(self.weight, dim=-1) if self.normed else self.weight * self.factor
        return nn.functional.linear(x, weight, self.bias)


def test_layers_of_one_class_that_compute_differently_are_told_apart():
    torch.manual_seed(0)
    model = nn.Sequential(*(Switched(*how) for how in [(False,), (True,), (False, 0.5)])).double()
    assert [ways.way_of(layer, nn.Linear) for layer in model] == ["added", "changed", "changed"]
    for layer in model:
        alone = nn.Sequential(layer)
        shaken(dw.attach(alone, dw.LoRA(rank=2), targets=["0"]))
        x = torch.randn(3, 6).double()
        y = alone(x)
        with dw.merged(alone):
            torch.testing.assert_close(alone(x), y)


def test_a_layer_is_probed_once_for_all_that_are_alike(monkeypatch):
    probed = []
    monkeypatch.setattr(ways, "_ways", {})
    monkeypatch.setattr(ways, "probed", lambda layer, kind: probed.append(layer) or "added")
    layers = [own_forward.CastingLinear(3, 4) for _ in range(9)] + [own_forward.CastingLinear(3, 4, device="meta")]
    dw.attach(nn.Sequential(*layers), dw.LoRA(rank=1), targets=[str(n) for n in range(10)])
    assert probed == [layers[0], layers[-1]]


def test_an_embedding_that_reads_values_too_runs_on_the_changed_weight():
    model = Wrapped(SuperAndValues(9, 4)).double()
    assert ways.way_of(model.layer, nn.Embedding) == "changed"
    ids = torch.tensor([1, 8])
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["layer"]))
    changed = model.layer.changed("weight")
    torch.testing.assert_close(model(ids), changed[ids] - changed.mean())


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (lambda: Helped(6, 5), torch.randn(3, 6)),
        (lambda: ByName(6, 5), torch.randn(3, 6)),
        (lambda: Divided(6, 5), torch.tensor([[1, 2]])),
    ],
)
def test_a_forward_whose_helpers_read_the_weight_sees_the_changed_one(layer, given):
    model = nn.Sequential(layer())
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["0"]))
    y = model(given)
    with dw.merged(model):
        torch.testing.assert_close(model(given), y)


def test_a_trial_writes_nothing():
    class Short(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model = nn.Sequential(Short(4, 3, max_norm=0.1))
    before = model[0].weight.detach().clone()
    assert ways.way_of(model[0], nn.Embedding) == "beneath"
    assert torch.equal(model[0].weight, before)


def test_a_forward_that_ignores_its_weight_is_refused():
    model = nn.Sequential(Ignoring(3, 2))
    with pytest.raises(TargetError, match="does not depend on its weight"):
        dw.attach(model, dw.LoRA(rank=2), targets=["0"])
    assert type(model[0]) is Ignoring


def test_a_subclass_of_a_subclass_keeps_both_forwards():
    torch.manual_seed(0)
    model = Wrapped(Twice(5, 3)).double()
    x = torch.randn(2, 5).double()
    before = model(x)
    dw.attach(model, dw.DoRA(rank=2), targets=["layer"])
    assert torch.equal(model(x), before)
    shaken(model)
    weight = model.layer.changed("weight")
    torch.testing.assert_close(model(x), 0.5 * nn.functional.linear(x, weight, model.layer.bias) + 1)
    dw.detach(model)
    assert type(model.layer) is Twice


def test_openai_whispers_linear_and_conv1d():
    whisper = pytest.importorskip("whisper.model", reason="openai-whisper is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    for layer, x in (
        (whisper.Linear(6, 4), torch.randn(2, 6)),
        (whisper.Conv1d(4, 8, 3, padding=1), torch.randn(2, 4, 9)),
    ):
        model = Wrapped(layer)
        before = model(x)
        half = model(x.bfloat16())
        dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
        assert torch.equal(model(x), before)
        assert torch.equal(model(x.bfloat16()), half)
        shaken(model)
        out = model(x)
        assert model(x.bfloat16()).dtype == torch.bfloat16
        dw.merge(model)
        torch.testing.assert_close(model(x), out)


def test_hf_whispers_positions():
    pytest.importorskip("transformers")
    from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

    model = Wrapped(WhisperPositionalEmbedding(9, 4)).double()
    ids = torch.zeros(1, 5, dtype=torch.long)
    before = model(ids)
    dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
    assert torch.equal(model(ids), before)
    shaken(model)
    torch.testing.assert_close(model(ids, past_key_values_length=2), model.layer.changed("weight")[2:7])
