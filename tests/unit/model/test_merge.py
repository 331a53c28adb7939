"""Merge and unmerge: exact in every dtype, a thousand times, over forms and ties; nothing half done."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ModelError, NonFinite
from deltaw.model import originals
from tests.laws.conftest import shaken

X = torch.randn(6, 8)


def model_with(variant=None, dtype=torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)
    dw.attach(model, variant or dw.LoRA(rank=2), **{"targets": ["0", "2"], **options})
    return shaken(model)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "adapters" not in n}


@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_and_unmerged_again_and_again(dtype, times):
    """R16: the base is restored bit for bit."""
    model = model_with(dtype=dtype)
    dw.attach(model, dw.DoRA(rank=2), targets=["0"], name="b")
    shaken(model)
    before = weights(model)
    for i in range(times):
        dw.merge(model, ["default", "b", {"default": 0.3, "b": -1.0}][i % 3], keep=["memory", "file"][i % 10 == 0])
        assert not torch.equal(model[0].weight, before["0.weight"])
        dw.unmerge(model)
        for name, value in weights(model).items():
            assert torch.equal(value, before[name])


def test_merged_equals_active_and_the_report_is_true():
    model = model_with(dtype=torch.bfloat16)
    active = model(X.bfloat16())
    delta = model[0].deltas("default")["weight"].delta_weight(torch.empty(0)).detach().double()
    before = model[0].weight.detach().double()
    report = dw.merge(model)
    line = next(w for w in report.weights if w.key == "0.weight")
    rounding = model[0].weight.double() - (before + delta)
    assert line.dtype == "bfloat16"
    assert line.largest == pytest.approx(float(delta.abs().max()), rel=1e-3)
    assert line.relative == pytest.approx(float(rounding.norm() / delta.norm()), rel=1e-2)
    assert report.kept_bytes == 2 * (8 * 12 + 12 * 4)
    assert "merged default into 2 weights" in str(report)
    torch.testing.assert_close(model(X.bfloat16()), active, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("into", ["dequantized", "original"])
@pytest.mark.parametrize("keep", ["memory", "file", None])
@pytest.mark.parametrize("form", [dw.Int8(), dw.NF4(), dw.Dense16()], ids=repr)
def test_forms(form, keep, into):
    model = model_with()
    dw.quantize(model, form, targets=["0", "2"], keep="memory")
    active, codes = model(X), model[0].form_of("weight").codes.clone()
    report = dw.merge(model, keep=keep, into=into)
    for line in report.weights:
        assert line.errors["dequantized"] < 1e-5 < line.errors["original"]
        assert line.relative == line.errors[into]
    assert "into='dequantized'" in str(report)
    assert (model[0].form_of("weight") is None) == (into == "dequantized")
    assert float((model(X) - active).detach().norm() / active.detach().norm()) < 0.3
    if keep is None:
        with pytest.raises(ModelError, match="originals are gone"):
            dw.unmerge(model)
        dw.detach(model)
        if into == "dequantized":
            assert type(model[0]) is nn.Linear
        else:
            with pytest.raises(ModelError, match="not kept"):
                dw.dequantize(model)
    else:
        dw.unmerge(model)
        assert torch.equal(model[0].form_of("weight").codes, codes)
        assert torch.equal(model(X), active)
        dw.dequantize(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("keep", ["memory", "file"])
@pytest.mark.parametrize("one_object", [True, False])
def test_tied_parameters_are_merged_once(one_object, keep):
    torch.manual_seed(0)
    model = Tied()
    if not one_object:
        model.head.weight = nn.Parameter(model.embed.weight.detach())
    dw.attach(model, dw.LoRA(rank=2), targets=["embed"])
    shaken(model)
    ids = torch.tensor([[1, 2], [8, 0]])
    before, active = model.embed.weight.detach().clone(), model(ids).detach()
    dw.merge(model, keep=keep)
    assert torch.equal(model.embed.weight, model.head.weight)
    torch.testing.assert_close(model(ids), active)
    dw.unmerge(model)
    assert torch.equal(model.embed.weight, before)
    assert torch.equal(model.head.weight, before)
    torch.testing.assert_close(model(ids), active)


def test_a_failure_midway_leaves_the_model_unchanged(monkeypatch):
    model = model_with()
    with torch.no_grad():
        model[2].deltas("default")["weight"].A[0, 0] = float("inf")
    before = weights(model)
    with pytest.raises(NonFinite, match=r"2\.weight"):
        dw.merge(model)
    assert all(torch.equal(v, before[n]) for n, v in weights(model).items())
    model, files = model_with(), []
    before = weights(model)

    def full(tensors, path):
        files.append(Path(path))
        raise OSError("No space left on device")

    monkeypatch.setattr(originals, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        dw.merge(model, keep="file")
    assert not files[0].exists()
    assert all(torch.equal(v, before[n]) for n, v in weights(model).items())
    assert not dw.status(model, "default").merged


def test_the_merged_context():
    model = model_with()
    before, active = weights(model), model(X)
    with pytest.raises(ZeroDivisionError), dw.merged(model):
        _ = 1 / 0
    assert all(torch.equal(v, before[n]) for n, v in weights(model).items())
    with dw.merged(model):
        torch.testing.assert_close(model(X), active)
        twin = copy.deepcopy(model)
        dw.unmerge(model)
    assert torch.equal(model(X), active)
    dw.unmerge(twin)
    assert torch.equal(twin(X), active)
    with pytest.raises(ModelError, match="nothing is merged"):
        dw.unmerge(model)


def test_merged_weights_lie_as_the_layers_own() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shaken(dw.attach(model, dw.LoRA(rank=2), ["0"]))
    strides = model[0].weight.stride()
    dw.merge(model)
    assert model[0].weight.stride() == strides
