"""PEFT's `target_parameters`: raw parameters of modules, whatever else lies inside these modules, go both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import deltaw as dw

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=4, **sizes)
    return MixtralForCausalLM(config).eval()


def adapted(base: nn.Module, folder: Path, modules: list[str], parameters: list[str], **options: object) -> nn.Module:
    """`base` adapted by PEFT, and saved in `folder`."""
    torch.manual_seed(1)
    named = {"target_modules": modules, "target_parameters": parameters, **options}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **named)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(folder)
    return theirs


def peft_type(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["peft_type"])


def test_a_router_is_no_expert(tmp_path: Path) -> None:
    """PEFT takes targets called `gate` for those of the stacked experts, but not raw parameters."""
    base = mixtral()
    expected = adapted(base, tmp_path / "a", ["q_proj"], ["mlp.gate.weight"])(IDS).logits
    model = dw.load(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(model(IDS).logits, expected)
    dw.save(model, tmp_path / "b")
    assert peft_type(tmp_path / "b") == "LORA"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected)
