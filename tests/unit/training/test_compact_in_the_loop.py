"""`compact=true` in a run: less memory for the same training, resumed to the bit, refused where it does nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from deltaw.errors import ConfigError
from deltaw.ops import compact
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.rehearsal import rehearse
from deltaw.training.run import train
from tests.unit.training.power_cut import power_cut


def settings(tiny, **changes):
    return build({
        "recipe": "text-classification", "model": str(tiny / "model"), "data": str(tiny / "data.csv"), "epochs": 2,
        "batch_size": 8, "checkpoint_every": 3, "lr": 5e-3, "keep": "last", "lora": {"rank": 4, "dropout": 0.1},
        "compact": True, **changes,
    })  # fmt: skip


def go(tiny, folder, *, resume=False, **changes):
    config = settings(tiny, **changes)
    return train(lambda: recipes["text-classification"].task(config), config, folder, resume=resume, quiet=True)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_resume_is_identical_and_the_run_differs_from_an_exact_one_by_little(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "SMALL", 1)  # the model is tiny, and so are its activations
    go(tiny, tmp_path / "calm")
    with power_cut(11):
        go(tiny, tmp_path / "broken")
    go(tiny, tmp_path / "broken", resume=True)
    one, other = weights(tmp_path / "calm"), weights(tmp_path / "broken")
    assert all(torch.equal(one[k], other[k]) for k in one)

    go(tiny, tmp_path / "exact", compact=False)
    exact = weights(tmp_path / "exact")
    assert not all(torch.equal(one[k], exact[k]) for k in one), "nothing was kept in 16 bit"
    losses = [json.loads((tmp_path / n / "results.json").read_text())["history"][-1]["loss"] for n in ("calm", "exact")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_dry_run_counts_what_is_kept(tiny):
    found = {}
    for choice in (False, True):
        config = settings(tiny, compact=choice, batch_size=64, method="full")
        found[choice] = rehearse(lambda config=config: recipes["text-classification"].task(config), config)
    assert found[True]["peak_bytes"] < found[False]["peak_bytes"]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"method": "base"}, "nothing is trained"), ({"precision": "bf16"}, "16 bit already")]
)
def test_where_it_does_nothing_it_is_refused_before_anything_is_loaded(tiny, tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        go(tiny, tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()
