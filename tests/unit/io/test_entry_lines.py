"""A fingerprint as lines: the same entries again, one object for all adapters of a base, and no table for what is foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import AdapterError
from deltaw.io.entry_lines import from_lines, to_lines
from deltaw.io.fingerprint import fingerprint


class Odd(nn.Module):
    """A scalar, a 16-bit weight, a name with a space."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.add_module("a layer", nn.Linear(4, 3).half())
        self.full = nn.Linear(5, 4)


def test_there_and_back() -> None:
    entries = fingerprint(Odd())["parameters"]
    lines = to_lines(entries)
    assert lines is not None
    assert len(lines) == len(entries) == 5
    assert from_lines(json.loads(json.dumps(lines))) == entries
    assert list(from_lines(lines)) == list(entries), "in the same order"


def test_of_a_quantised_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    dw.quantize(model, dw.Int8())
    entries = fingerprint(model)["parameters"]
    assert entries["0.weight"]["form"] == "int8"
    assert from_lines(to_lines(entries) or []) == entries


@pytest.mark.parametrize(
    "change", [{"note": "mine"}, {"dtype": "F 32"}, {"shape": 4}, {"sketch": None}, {"sketch": [0.5]}]
)
def test_entries_of_another_kind_are_left_as_they_are(change: dict[str, object]) -> None:
    entries = fingerprint(nn.Linear(4, 3))["parameters"]
    entries["weight"] = {**entries["weight"], **change}
    assert to_lines(entries) is None


@pytest.mark.parametrize("lines", [["F32 4"], [7], ["F32 4xx dense a b c 1 w"], "twice"])
def test_what_is_not_readable_is_an_error(lines: object) -> None:
    whole = to_lines(fingerprint(nn.Linear(4, 3))["parameters"])
    assert whole is not None
    with pytest.raises(AdapterError, match="not readable"):
        from_lines(whole * 2 if lines == "twice" else lines)  # type: ignore[arg-type]


def test_adapters_of_one_base_share_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    dw.attach(model, dw.LoRA(rank=2), targets="0")
    dw.save(model, tmp_path / "one")
    table = json.loads((tmp_path / "one" / "deltaw_manifest.json").read_text())["base"]["fingerprint"]["parameters"]
    assert [line.rsplit(" ", 1)[1] for line in table] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    dw.load(model, tmp_path / "one", name="a")
    dw.load(model, tmp_path / "one", name="b")
    tables = [dw.get(model, name).base["fingerprint"]["parameters"] for name in "ab"]
    assert tables[0] is tables[1]
    assert tables[0] == fingerprint(model)["parameters"]
