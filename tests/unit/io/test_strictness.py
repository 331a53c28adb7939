"""What a config may say, and tensors that it does not account for: PEFT guesses or drops them, here they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deltaw as dw
from deltaw.errors import AdapterError
from deltaw.io import AdapterNotice, strict_json, tensor_file
from deltaw.io.pattern import pattern
from deltaw.io.peft.claims import pattern_value

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.mha = nn.Linear(8, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2)


def folder(path: Path, modules: str, **changed: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changed}))
    pairs = {f"base_model.model.{m}.lora_{p}.weight": torch.randn(2, 8) for m in modules for p in "AB"}
    tensors = {name: t if ".lora_A." in name else t.T.contiguous() for name, t in pairs.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "maybe"),
        ("bias", True),
        ("use_rslora", "no"),
        ("use_dora", 0),
        ("lora_bias", "false"),
        ("fan_in_fan_out", "x"),
        ("inference_mode", "yes"),
        ("r", "2"),
        ("r", 2.0),
        ("lora_alpha", True),
        ("lora_dropout", "0"),
        ("task_type", 5),
        ("base_model_name_or_path", 3),
        ("init_lora_weights", 3),
        ("target_parameters", "q.weight"),
        ("alpha_pattern", {f"a{n}": 1 for n in range(10_001)}),
    ],
)
def test_values_of_another_type_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(AdapterError, match="rank in the config is 2.0" if value == 2.0 and field == "r" else field):
        dw.read(folder(tmp_path / "a", "q", **{field: value}))


@pytest.mark.filterwarnings("ignore::deltaw.io.AdapterNotice")
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"target_modules": ["q"]}, r"'v\.weight'.*does not target \(target_modules is \('q',\)\)"),
        ({"target_modules": "q"}, r"'v\.weight'.*does not target \(target_modules is q\)"),
        (
            {"target_modules": ["q", "v"], "exclude_modules": ["v"]},
            r"'v\.weight'.*does not target \(exclude_modules is \('v',\)\)",
        ),
        (
            {"target_modules": ["q", "v"], "layers_to_transform": [3]},
            r"does not target \(layers_to_transform is \(3,\)\).*change layers_to_transform",
        ),
        ({"target_modules": ["q", "v"]}, None),
        ({"target_modules": "q|v"}, None),
        ({"target_modules": "all-linear"}, None),
    ],
)
def test_tensors_of_modules_that_are_not_targeted(tmp_path: Path, said: dict[str, Any], reason: str | None) -> None:
    model, path = Net(), folder(tmp_path / "a", "qv", **said)
    if reason is None:
        dw.load(model, path)
        assert set(dw.get(model).changes) == {"q.weight", "v.weight"}
    else:
        with pytest.raises(AdapterError, match=reason):
            dw.load(model, path)
        assert not dw.adapters(model)


def test_a_header_of_half_a_million_names_is_refused_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = ("{" + ",".join(f'"{n}":0' for n in range(500_001)) + "}").encode()
    monkeypatch.setattr(strict_json, "parse", None)  # must not be reached
    with pytest.raises(AdapterError, match="100,000"):
        tensor_file.read_header(memoryview(len(raw).to_bytes(8, "little") + raw), "it")


def test_patterns_that_cannot_match_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    patterns = {f"layers.{n}.q{n}": n for n in range(1000)} | {"layers.7.q": 5, r".*\.k": 6}
    from deltaw.io.peft import claims

    def counted(text: str) -> Any:
        run.append(text)
        return pattern(text)

    monkeypatch.setattr(claims, "pattern", counted)
    assert pattern_value(patterns, "model.layers.7.q", 1) == (5, ["layers.7.q"])
    assert run == ["layers.7.q", r".*\.k"]


def test_saving_in_our_own_words_is_said(tmp_path: Path) -> None:
    model = Net()
    dw.attach(model, dw.DoRA(rank=2), ["mha"])
    with pytest.warns(AdapterNotice, match="which PEFT refuses: LORA: "):
        dw.save(model, tmp_path / "a")
    dw.save(model, tmp_path / "b", grammar="DELTAW")  # asked for: nothing to say


@pytest.mark.parametrize("text", ["", "[", "]]", '"', '"[', "\\", '\\"]', "[" * 40, "]" * 40])
@pytest.mark.parametrize("levels", [30, 31, 32])
def test_nesting_counts_brackets_outside_of_texts_only(text: str, levels: int) -> None:
    value: Any = [text, {text: text}]
    for n in range(levels - 2):
        value = [text, value] if n % 2 else {text: value, "b": [text]}
    raw = json.dumps({"a": value}).encode()  # as deep as `levels` + 1
    if levels + 1 <= strict_json.MAX_DEPTH:
        assert strict_json.parse(raw, "it", 1 << 20) == {"a": value}
    else:
        with pytest.raises(AdapterError, match="nested deeper"):
            strict_json.parse(raw, "it", 1 << 20)


@pytest.mark.parametrize(("digits", "taken"), [("1" * 20, True), ("1" * 21, False), ("-" + "9" * 21, False)])
def test_whole_numbers_are_bounded_wherever_digits_stand(digits: str, taken: bool) -> None:
    raw = f'{{"hash": "{"7" * 64}", "n": {digits}}}'.encode()
    if taken:
        assert strict_json.parse(raw, "it", 1 << 20)["n"] == int(digits)
    else:
        with pytest.raises(AdapterError, match="too large"):
            strict_json.parse(raw, "it", 1 << 20)
