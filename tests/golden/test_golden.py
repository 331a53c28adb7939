"""Adapters of earlier releases and of other tools, kept here, mean what they always meant."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.io.convert import read_any
from tests.golden.make_golden import HINTS, Golden, dense

HERE = Path(__file__).resolve().parent
FOLDERS = sorted(p.name for p in HERE.iterdir() if p.is_dir() and p.name.startswith(("deltaw-", "peft-")))
FILES = sorted(p.name for p in HERE.iterdir() if p.name.startswith("as-"))


def agree(adapter: dw.Adapter, expected: Path) -> None:
    wanted = load_file(expected)
    found = dense(adapter)
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= 1e-6 * max(1.0, float(tensor.abs().max()))


def test_they_are_here() -> None:
    assert len(FOLDERS) >= 11
    assert len(FILES) >= 6
    size = sum(p.stat().st_size for p in HERE.rglob("*") if p.suffix in (".safetensors", ".json", ".gguf"))
    assert size < 500_000


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name: str) -> None:
    model = Golden()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name.startswith("deltaw-") else "ignore")  # ours know their base
        dw.load(model, HERE / name)
    agree(dw.get(model), HERE / f"{name}.expected.safetensors")
    dw.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Golden().parameters()))


@pytest.mark.parametrize("name", FILES)
def test_other_format(name: str) -> None:
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    agree(read_any(HERE / name, HINTS), HERE / "as.expected.safetensors")
