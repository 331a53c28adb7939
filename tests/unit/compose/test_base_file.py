"""A base that is read beside adapters must be the one that they were trained on."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deltaw as dw
from deltaw.compose.base_file import check, opened
from deltaw.errors import BaseMismatch


def trained(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    dw.attach(model, dw.DoRA(rank=2), targets=["0", "2"])
    dw.save(model, folder / "adapter")
    return weights, {"adapter": dw.read(folder / "adapter")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_base_trained_on_is_taken_in_either_precision(tmp_path, dtype):
    weights, adapters = trained(tmp_path)
    save_file({n: w.to(dtype) for n, w in weights.items()}, tmp_path / "base.safetensors")
    check(opened(str(tmp_path / "base.safetensors")), adapters)


def test_other_weights_are_refused_by_name(tmp_path):
    weights, adapters = trained(tmp_path)
    save_file({**weights, "2.weight": weights["2.weight"] + 0.01}, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatch, match=r"2\.weight.*--allow-base-mismatch"):
        check(opened(str(tmp_path / "other.safetensors")), adapters)


def test_a_base_without_the_weight_is_refused(tmp_path):
    weights, adapters = trained(tmp_path)
    save_file({"0.weight": weights["0.weight"]}, tmp_path / "half.safetensors")
    with pytest.raises(BaseMismatch, match=r"2\.weight: missing"):
        check(opened(str(tmp_path / "half.safetensors")), adapters)
