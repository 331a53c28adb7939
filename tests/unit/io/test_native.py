"""What PEFT's grammar cannot say goes into deltaw's own, which says everything, and which PEFT rejects."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io import AdapterNotice, digest
from deltaw.io.folder import CONFIG, MANIFEST, WEIGHTS
from tests.unit.io.adapter_folders import parts, put, shaken


class Odd(nn.Module):
    """Layers and ties that PEFT has no words for."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.back = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = x + self.back(self.grouped(x.mT)).mT + self.memory(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.down(torch.tanh(self.up(self.qkv(x)))))


def odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


IDS = torch.arange(12).reshape(2, 6)
CASES: dict[str, Any] = {
    "tied": {"words": dw.LoRA(rank=2)},
    "grouped": {"grouped": dw.LoRA(rank=2)},
    "transposed": {"back": dw.LoRA(rank=2)},
    "lstm": {"memory": dw.LoRA(rank=2)},
    "attention dora": {"attention": dw.DoRA(rank=2)},
    "parts": {"qkv[0:8]": dw.LoRA(rank=2), "qkv[16:24]": dw.LoRA(rank=3)},
    "mixed methods": {"up": dw.LoRA(rank=2), "down": dw.DoRA(rank=2)},
    "mixed vera": {"up": variants["vera"](rank=6), "down": variants["vera"](rank=6)},
    "one parameter of two": {"up": dw.LoRA(rank=2), "qkv.weight": dw.Full()},
    "rows of a convolution": {"grouped.weight": dw.Rows(indices=(1, 5))},
    "rows beside a bias": {"up.weight": dw.Rows(indices=(1, 5))},
    "rows of a tie that the model does not tell": {"words": dw.Rows(indices=(1, 5))},
} | {
    f"tied {variant.kind}": {"head": variant}
    for variant in (dw.LoKr(rank=2), dw.LoHa(rank=2), dw.VeRA(rank=2), dw.IA3(), dw.AdaLoRA(rank=3, target=2))
}
ONLY_THE_MODEL_KNOWS = (
    "one parameter of two",
    "rows beside a bias",
    "rows of a tie that the model does not tell",
)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_it_says_what_peft_cannot(tmp_path: Path, case: str) -> None:
    model = odd()
    dw.attach(model, CASES[case])
    expected = shaken(model)(IDS)
    assert not torch.allclose(expected, odd()(IDS), atol=1e-3)
    with pytest.warns(AdapterNotice, match="saved in deltaw's own words"):
        dw.save(model, tmp_path / "a")
    config, _ = parts(tmp_path / "a")
    assert config["peft_type"] == "DELTAW"
    assert torch.equal(dw.load(odd(), tmp_path / "a")(IDS), expected)
    assert digest(dw.read(tmp_path / "a")) == digest(dw.get(model))
    if case not in ONLY_THE_MODEL_KNOWS:
        with pytest.raises(AdapterError, match="cannot be said"):
            dw.write(dw.get(model), tmp_path / "b", grammar="PEFT")
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(odd(), str(tmp_path / "a"))
    (tmp_path / "a" / MANIFEST).unlink()  # the two files alone say it too
    assert torch.equal(dw.load(odd(), tmp_path / "a", allow_base_mismatch=True)(IDS), expected)


@pytest.mark.parametrize("kind", sorted(k for k, _ in variants.items()))
def test_every_method_round_trips(tmp_path: Path, kind: str) -> None:
    """Whatever is registered, plugins included, with each of its examples."""
    for n, variant in enumerate(variants[kind].examples()):
        model = odd()
        dw.attach(model, {"up": variant, "down": variant})
        adapter = dw.get(shaken(model))
        for grammar in (None, "DELTAW"):
            folder = dw.write(adapter, tmp_path / f"{n}-{grammar}", grammar=grammar)
            back = dw.read(folder)
            assert {k: c.variant for k, c in back.changes.items()} == {k: c.variant for k, c in adapter.changes.items()}
            assert back.tensors().keys() == adapter.tensors().keys()
            assert all(torch.equal(t, back.tensors()[k]) for k, t in adapter.tensors().items())
            assert digest(back) == digest(adapter)


def test_shared_tensors_are_kept_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    dw.attach(model, variants["vera"](rank=128))
    dw.write(dw.get(model), tmp_path / "a", grammar="DELTAW")
    config, tensors = parts(tmp_path / "a")
    assert len(config["shared"]) == 10  # A and B of five of six layers
    assert sum(t.numel() for t in tensors.values()) < 2 * 64 * 128 + 6 * (64 + 128) + 1
    assert dw.read(tmp_path / "a").changes.keys() == dw.get(model).changes.keys()


@pytest.mark.parametrize(
    "change", ["format", "variants", "option", "kind", "entry", "extra", "missing", "shared", "shape"]
)
def test_damage_is_refused(tmp_path: Path, change: str) -> None:
    model = odd()
    dw.attach(model, CASES["mixed methods"])
    dw.save(shaken(model), tmp_path / "a")
    config, tensors = parts(tmp_path / "a")
    match change:
        case "format":
            config["format"] = 99
        case "variants":
            config["variants"] = {}
        case "option":
            config["variants"][0]["options"]["rank"] = -1
        case "kind":
            config["variants"][0]["kind"] = "os.system"
        case "entry":
            config["changes"]["up.weight"] = [7, None, None, ["A"], []]
        case "extra":
            tensors["up.weight.C"] = torch.ones(2)
        case "missing":
            del tensors["up.weight.B"]
        case "shared":
            config["shared"] = {"up.weight.B": "../../etc/passwd"}
        case "shape":
            tensors["up.weight.B"] = tensors["up.weight.B"].mT
    put(tmp_path / "b", config, tensors)
    with pytest.raises(AdapterError):
        dw.read(tmp_path / "b")
    target = odd()
    with pytest.raises(AdapterError):
        dw.load(target, tmp_path / "b")
    assert type(target.up) is nn.Linear


def test_facts_travel(tmp_path: Path) -> None:
    model = odd()
    dw.attach(model, dw.LoRA(rank=2), ["up"])
    adapter = dw.get(model)
    adapter = adapter.replace(
        base={"name": "some/model"}, extra={"labels": ["no", "yes"], "x": 1e-7}, error={"up.weight": 0.25}
    )
    for grammar in (None, "DELTAW"):
        back = dw.read(dw.write(adapter, tmp_path / str(grammar), grammar=grammar))
        assert (back.base, back.extra, back.error) == (adapter.base, adapter.extra, adapter.error)
    assert json.loads((tmp_path / "None" / CONFIG).read_text())["base_model_name_or_path"] == "some/model"
    assert (tmp_path / "None" / WEIGHTS).stat().st_size < 10_000
    with pytest.raises(TypeError):
        dw.write(copy.copy(adapter).replace(extra={"x": object()}), tmp_path / "c")
