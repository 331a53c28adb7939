"""A tiny text task, trained in this process."""

from __future__ import annotations

import pytest

from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.run import train
from tests.tiny_text import make_data, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with model/ and data.csv."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    make_data(folder / "data.csv", 80)
    return folder


@pytest.fixture
def run(tiny):
    """Train into a folder; `wrap` may replace the task."""

    def call(folder, *, resume=False, wrap=lambda task: task, **changes):
        given = {
            "recipe": "text-classification", "model": str(tiny / "model"), "data": str(tiny / "data.csv"), "epochs": 2,
            "batch_size": 8, "checkpoint_every": 3, "lr": 5e-3, "lora": {"dropout": 0.1, "rank": 4},
            "cache_prefix": False,  # finding the prefix runs the model too, and tests count its runs
            **changes,
        }  # fmt: skip
        config = build(given)
        return train(
            lambda: wrap(recipes["text-classification"].task(config)), config, folder, resume=resume, quiet=True
        )

    return call
