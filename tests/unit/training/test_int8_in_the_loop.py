"""`quantize=int8` in a run: kernels are timed once, kept in run.json and in checkpoints, and taken from there by resume."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from deltaw.errors import ConfigError, UnknownName
from deltaw.model.quantize import kernel_choices
from deltaw.model.state import hosts
from deltaw.ops import choices, select
from deltaw.ops.int8 import int8_available
from deltaw.recipes.configure import build
from deltaw.recipes.kept import open_kept, score
from deltaw.recipes.recipe import recipes
from deltaw.training.rehearsal import rehearse
from deltaw.training.run import train
from tests.unit.training.power_cut import power_cut


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """The layers of these tests are small, and run in 8 bit all the same."""
    monkeypatch.setattr(select, "FORMED", -1)


def go(tiny, folder, *, resume=False, **changes):
    given = {
        "recipe": "text-classification", "model": str(tiny / "model"), "data": str(tiny / "data.csv"), "epochs": 2,
        "batch_size": 8, "checkpoint_every": 3, "lr": 5e-3, "keep": "last", "lora": {"rank": 4, "dropout": 0.1},
        "quantize": "int8", **changes,
    }  # fmt: skip
    config = build(given)
    return train(lambda: recipes["text-classification"].task(config), config, folder, resume=resume, quiet=True)


@pytest.mark.skipif(not int8_available(), reason="no VNNI on this processor")
def test_resume_takes_the_recorded_kernels_and_ends_in_the_same_bits(tiny, tmp_path, monkeypatch):
    timed = []
    answer = [(True, False)]
    monkeypatch.setattr(choices, "time_int8", lambda *shape: (timed.append(shape), answer[0])[1])
    go(tiny, tmp_path / "calm")
    first = list(timed)
    assert first
    assert len(set(first)) == len(first), "a shape is timed once"
    kernels = json.loads((tmp_path / "calm" / "run.json").read_text())["kernels"]
    assert [tuple(k["shape"]) for k in kernels["kernels"]] == sorted(first)
    assert kernels["looks"]

    with power_cut(11):
        go(tiny, tmp_path / "broken")
    answer[0] = (False, True)  # whoever times again gets another answer
    timed.clear()
    go(tiny, tmp_path / "broken", resume=True)
    assert timed == []
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("calm", "broken"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    go(tiny, tmp_path / "otherwise")
    changed = load_file(tmp_path / "otherwise" / "adapter_model.safetensors")
    assert not all(torch.equal(one[k], changed[k]) for k in one), "the kernels do matter to the bits"


def test_what_cannot_be_quantised_is_refused_before_anything_is_loaded(tiny, tmp_path):
    with pytest.raises(UnknownName, match=r"quantize='int9': no such form.*did you mean 'int8'"):
        go(tiny, tmp_path / "a", quantize="int9")
    with pytest.raises(ConfigError, match="every weight is trained"):
        go(tiny, tmp_path / "b", method="full")
    assert not any((tmp_path / n).exists() for n in "ab")


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_kept_result_answers_over_the_base_that_it_was_trained_over(tiny, tmp_path, form):
    found = go(tiny, tmp_path / "run", quantize=form)
    assert score(tmp_path / "run", [])["loss"] == pytest.approx(found["test"]["loss"], abs=1e-7)
    config, _, model = open_kept(tmp_path / "run")
    assert config.quantize == form
    held = [host for _, host in hosts(model) if host.form_of("weight") is not None]
    assert held
    record = kernel_choices(model)
    assert (record is not None) == (form == "int8")
    assert record is None or ((record.int8 or not int8_available()) and not record.timed)


def test_a_dry_run_measures_the_quantised_model(tiny):
    found = {}
    for form in (None, "int8"):
        given = {
            "recipe": "text-classification", "model": str(tiny / "model"), "data": str(tiny / "data.csv"), "quantize": form
        }  # fmt: skip
        config = build(given)
        found[form] = rehearse(lambda config=config: recipes["text-classification"].task(config), config)
    assert 0 < found["int8"]["weight_bytes"] < found[None]["weight_bytes"]
    assert found["int8"]["trainable"] == found[None]["trainable"]
    assert found["int8"]["peak_bytes"] > 0
