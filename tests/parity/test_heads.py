"""Heads and parts of modules that are trained in full, in files that PEFT reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import torch
import transformers

import deltaw as dw
from tests.laws.conftest import shaken

IDS = torch.tensor([[1, 5, 7, 2], [1, 4, 2, 0]])


def test_a_head_of_several_layers_is_one_module_to_save(tmp_path: Path) -> None:
    """PEFT saves the whole `classifier` of a sequence classifier: it must not meet its parts (RoBERTa's head)."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    base = transformers.RobertaForSequenceClassification(config).eval()
    model = copy.deepcopy(base)
    dw.attach(model, dw.LoRA(rank=2), ["query", "value"], train=["classifier"])
    shaken(model)
    out = model(IDS).logits
    dw.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(IDS).logits, out, rtol=0, atol=1e-6)
    ours = dw.load(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(ours(IDS).logits, out)


def test_parameters_of_a_module_whose_layers_stay_frozen_come_back(tmp_path: Path) -> None:
    """PEFT could only save the module with all its layers: deltaw's own grammar is taken, and reads back."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    base, pixels = transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 8, 8)
    model = copy.deepcopy(base)
    dw.attach(model, dw.LoRA(rank=2), ["query" if has(base, "query") else "q_proj"], train=["cls_token"])
    shaken(model)
    out = model(pixels).logits
    dw.save(model, tmp_path / "a")
    assert torch.equal(dw.load(copy.deepcopy(base), tmp_path / "a")(pixels).logits, out)


def has(model: torch.nn.Module, name: str) -> bool:
    return any(path.endswith("." + name) for path, _ in model.named_modules())
