"""Originals that are kept in a temporary file: copies share it, it goes with its last owner, and without it there is a way on."""

import copy
import gc
import os
import pickle
import tempfile

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ModelError
from deltaw.model import originals
from tests.laws.conftest import shaken

X = torch.randn(3, 8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def merged() -> nn.Module:
    model = shaken(dw.attach(plain(), dw.LoRA(rank=2), ["0"]))
    dw.merge(model, keep="file")
    return model


def quantised() -> nn.Module:
    model = plain()
    dw.quantize(model, dw.Int8(), targets=["0", "1"], keep="file")
    return model


MADE = pytest.mark.parametrize(("made", "back"), [(merged, dw.unmerge), (quantised, dw.dequantize)])


@MADE
def test_copies_share_the_file_and_the_last_one_takes_it_along(folder, made, back):
    model, expected = made(), plain()[0].weight
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    for each in (first, model):
        assert torch.equal(back(each)[0].weight, expected)
        assert len(os.listdir(folder)) == 1
    back(second)
    assert not os.listdir(folder)


@MADE
def test_a_model_that_is_dropped_leaves_no_file(folder, made, back):
    model = made()
    assert len(os.listdir(folder)) == 1
    del model
    gc.collect()
    assert not os.listdir(folder)


def test_dense_weights_instead_of_the_originals_leave_no_file(folder):
    dw.dequantize(quantised(), into="dense")
    assert not os.listdir(folder)


@MADE
def test_a_pickle_and_a_fork_delete_nothing(folder, made, back):
    model = made()
    again = pickle.loads(pickle.dumps(model))
    back(again)
    del again
    assert len(os.listdir(folder)) == 1
    (file,) = folder.iterdir()
    originals.removed(file, os.getpid() + 1)
    assert file.exists()
    back(model)


def test_a_merge_whose_file_is_gone_can_be_kept_for_good(folder):
    model = merged()
    (file,) = folder.iterdir()
    file.unlink()
    output = model(X)
    with pytest.raises(ModelError, match=rf"{file.name}, which is gone.*dw\.detach"):
        dw.unmerge(model)
    assert torch.equal(model(X), output)
    assert torch.equal(dw.detach(model)(X), output)
    dw.attach(model, dw.LoRA(rank=2), ["0"])


def test_quantised_weights_whose_file_is_gone_become_dense(folder):
    model = quantised()
    (file,) = folder.iterdir()
    file.unlink()
    output = model(X)
    with pytest.raises(ModelError, match=rf"{file.name}, which is gone.*into='dense'"):
        dw.dequantize(model)
    assert torch.equal(model(X), output)
    dw.dequantize(model, into="dense")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("into", ["dequantized", "original"])
def test_a_kept_original_is_not_that_of_a_weight_merged_for_good(folder, into):
    model = shaken(dw.attach(nn.Sequential(*plain(), nn.LayerNorm(8)), dw.LoRA(rank=2), ["0"], train=["2"]))
    dw.quantize(model, dw.Int8(), targets=["0"], keep="memory")
    dw.merge(model, keep="file", into=into)
    next(folder.iterdir()).unlink()
    output = dw.detach(model)(X)
    if into == "original":
        with pytest.raises(ModelError, match="were not kept"):
            dw.dequantize(model)
        dw.dequantize(model, into="dense")
    torch.testing.assert_close(model(X), output, rtol=0.05, atol=0.05)


def test_nothing_is_left_behind_if_the_file_cannot_be_written(folder, monkeypatch):
    def full(tensors, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(originals, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        quantised()
    with pytest.raises(OSError, match="No space"):
        merged()
    assert not os.listdir(folder)


@pytest.mark.parametrize("keep", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_originals_come_back_in_the_dtype_that_the_model_has_by_then(folder, keep, dtype):
    for form in (None, dw.Int8()):
        model = plain()
        expected = model[0].weight.detach().to(dtype)
        if form is not None:
            dw.quantize(model, form, targets=["0", "1"], keep=keep)
        shaken(dw.attach(model, dw.LoRA(rank=2), ["0"]))
        dw.merge(model, keep=keep)
        model.to(dtype)
        dw.unmerge(model)
        assert model(X.to(dtype)).dtype == dtype
        if form is not None:
            assert model[0].form_of("weight").dtype == dtype
            dw.dequantize(model)
        assert torch.equal(model[0].weight, expected)
        assert model(X.to(dtype)).dtype == dtype


def test_dense_weights_have_the_dtype_that_the_model_has_by_then():
    model = plain()
    dw.quantize(model, dw.Int8(), targets=["0", "1"])
    model.double()
    dw.dequantize(model, into="dense")
    assert model(X.double()).dtype == torch.float64
