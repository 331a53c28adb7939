"""Data-based starts through a run: the adapter starts from the training examples, the same ones when it is resumed."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from deltaw.errors import ConfigError, NonFinite
from deltaw.recipes.configure import build
from deltaw.recipes.start import start

pytest.importorskip("transformers")


def configured(folder, init, **more):
    given = {
        "recipe": "text-classification",
        "model": str(folder / "model"),
        "data": str(folder / "data.csv"),
        "targets": ["query", "value"],
        "lora": {"rank": 2, "init": init},
        "epochs": 2,
        "batch_size": 16,
        "checkpoint_every": 2,
    }
    return build({**given, **more})


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_it_trains_and_differs_from_a_random_start(tiny, tmp_path, init, capsys):
    start(configured(tiny, init), tmp_path / "one")
    assert "training examples" in capsys.readouterr().out
    start(configured(tiny, init), tmp_path / "two", quiet=True)
    start(configured(tiny, "kaiming"), tmp_path / "plain", quiet=True)
    one, two, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two", "plain"))
    assert all((one[k] == two[k]).all() for k in one)
    assert any(one[k].shape != plain[k].shape or (one[k] != plain[k]).any() for k in one)


def test_a_start_that_makes_up_for_quantisation_is_given_the_unquantised_weights(tiny, tmp_path, capsys):
    start(configured(tiny, "loftq", quantize="nf4"), tmp_path / "one")
    assert "starts from what quantisation takes from the weights" in capsys.readouterr().out
    start(configured(tiny, "kaiming", quantize="nf4"), tmp_path / "plain", quiet=True)
    one, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "plain"))
    key = next(key for key in one if key.endswith("lora_B.weight"))
    assert one[key].norm() > 2 * plain[key].norm()
    with pytest.raises(ConfigError, match="nothing is quantised: set quantize=nf4"):
        start(configured(tiny, "loftq"), tmp_path / "none", quiet=True)


def test_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    from deltaw.training.fit import Fit

    start(configured(tiny, "eva"), tmp_path / "whole", quiet=True)
    step = Fit._step

    def stumble(self, *args):
        if self.state.step == 5:
            raise NonFinite("stopped here by the test")
        step(self, *args)

    monkeypatch.setattr(Fit, "_step", stumble)
    with pytest.raises(NonFinite):
        start(configured(tiny, "eva"), tmp_path / "stopped", quiet=True)
    monkeypatch.setattr(Fit, "_step", step)
    start(configured(tiny, "eva"), tmp_path / "stopped", resume=True, quiet=True)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "stopped"))
    assert all((one[k] == other[k]).all() for k in one)
