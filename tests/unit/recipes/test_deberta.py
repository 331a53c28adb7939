"""deberta: the seed's counts, from the recipe's own configuration; a tiny one learns, and its result opens again."""

from __future__ import annotations

import pytest
import torch

import deltaw as dw
from deltaw.recipes.configure import build
from deltaw.recipes.kept import open_kept, score
from deltaw.recipes.start import start
from tests.tiny_text import make_data, make_model

pytest.importorskip("transformers")


def test_the_large_one_has_the_seeds_counts():
    from transformers import AutoModelForSequenceClassification

    from deltaw.training.config import method_variant
    from deltaw.training.tasks.deberta import deberta_config

    config = build({"recipe": "deberta", "deberta": {"size": "large"}})
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(deberta_config("large"))
    assert sum(p.numel() for p in model.parameters()) == 435_063_810
    dw.attach(model, method_variant(config), config.targets, train=["classifier"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 788_482


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tiny_one_learns_and_its_result_opens_again(tmp_path, method):
    make_model(tmp_path / "words")
    make_data(tmp_path / "data.csv", 240)
    config = build(
        {
            "recipe": "deberta",
            "method": method,
            "deberta": {"tokenizer": str(tmp_path / "words")},
            "data": {"path": str(tmp_path / "data.csv"), "split": None},
            "epochs": 4,
            "lr": 2e-3,
            "base_dropout": 0.0,
        }
    )
    results = start(config, tmp_path / "run", quiet=True)
    assert results["best"]["loss"] < 0.67  # ln 2 = .693 is knowing nothing
    assert results["history"][-1]["train_loss"] < results["history"][0]["train_loss"]
    assert score(tmp_path / "run", [], "test")["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)
    _, task, model = open_kept(tmp_path / "run")
    assert task.predict(model, ["a wonderful film"])[0]["label"] in ("good", "bad")
    if method == "lora":
        assert results["parameters"]["trainable"] == 2 * 2 * 8 * (128 + 128) + 128 * 2 + 2
