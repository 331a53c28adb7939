"""The mnist recipe on a few drawn pictures: it makes its own base, whatever the run that asks for it is like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltaw.errors import ConfigError
from deltaw.recipes.configure import build
from deltaw.recipes.kept import score
from deltaw.recipes.start import start


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """200 pictures for training and 40 for the test: a bright row whose height is the digit."""
    rng = np.random.default_rng(0)
    found = {}
    for part, count in (("train", 200), ("test", 40)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        pictures = rng.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        pictures[np.arange(count), 2 * labels + 3] = 250
        found |= {f"x_{part}": pictures, f"y_{part}": labels}
    np.savez(tmp_path / "mnist.npz", **found)
    return tmp_path / "mnist.npz"


@pytest.mark.parametrize("more", [{}, {"quantize": "int8"}, {"quantize": "nf4"}])
def test_the_base_is_made_by_full_training_of_plain_weights(more: dict[str, str], digits: Path, tmp_path: Path) -> None:
    options = {"source": str(digits), "pretrain_epochs": 1}
    config = build({"recipe": "mnist", "method": "lora", "epochs": 1, "mnist": options, **more})
    results = start(config, tmp_path / "run", quiet=True)
    assert results["method"] == "lora"
    assert (tmp_path / "run" / "pretrained" / "model" / "model.safetensors").is_file()


def test_data_names_the_pictures_as_well(digits: Path, tmp_path: Path) -> None:
    given = {"recipe": "mnist", "method": "full", "epochs": 1, "data": str(digits)}
    results = start(build({**given, "mnist": {"scratch": True}}), tmp_path / "run", quiet=True)
    assert results["examples"] == {"train": 190, "validation": 10, "test": 40}
    assert score(tmp_path / "run", [f"data={digits}"], "test")["examples"] == 40
    with pytest.raises(ConfigError, match=r"mnist.source=other.npz and data=.* both name the data: give one"):
        start(build({**given, "mnist": {"source": "other.npz"}}), tmp_path / "again", quiet=True)
