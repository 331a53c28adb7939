"""`deltaw data gw` and `deltaw chat`, as a user runs them."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from tests.tiny_chat import make_chat_model, make_talks


@pytest.mark.skipif(find_spec("lalsimulation") is None, reason="lalsuite is not installed")
def test_data_gw_writes_what_it_says(deltaw, tmp_path):
    said = json.loads(deltaw("data", "gw", "--n", 4, "--test", 2, "--snr", "12", "--out", "gw", "--json").out)
    assert said["sizes"] == {"train": 4, "validation": 4, "test": 2}
    assert said["snr"] == [12.0, 12.0]
    assert sorted(p.name for p in (tmp_path / "gw").iterdir()) == [
        "dataset.json",
        "test.safetensors",
        "train.safetensors",
        "validation.safetensors",
    ]
    assert "exists" in deltaw("data", "gw", "--n", 4, "--out", "gw", code=2).err
    assert "an even number" in deltaw("data", "gw", "--n", 3, "--out", "odd", code=2).err
    assert "--snr loud" in deltaw("data", "gw", "--snr", "loud", "--out", "bad", code=2).err


def test_chat_without_a_terminal(deltaw, tmp_path):
    make_chat_model(tmp_path / "model")
    make_talks(tmp_path / "talks.jsonl")
    options = ["data=talks.jsonl", "max_length=96", "epochs=1", "data.validation=0.2", "data.test=0"]
    deltaw("train", "sft", "model=model", *options, "--out", "run")
    said = deltaw("chat", "run", "--prompt", "a number 1", "--max-new-tokens", 4).out.splitlines()
    assert [line.split(" ")[0] for line in said if line[:4] in ("you ", "base", "adap")] == ["you", "base", "adapter"]
    piped = deltaw("chat", "run", "--json", "--alone", "--max-new-tokens", 4, input="a number 1\nb number 2\n\n").out
    found = [json.loads(line) for line in piped.splitlines() if line.startswith("{")]
    assert [row["prompt"] for row in found] == ["a number 1", "b number 2"]
    assert all("base" not in row and "adapter" in row for row in found)
    assert "--prompt is empty" in deltaw("chat", "run", "--prompt", " ", code=3).err
