"""PEFT's `target_parameters`: raw parameters of modules, whatever else lies inside these modules, go both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import deltaw as dw
from deltaw.errors import AdapterError

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


class Inner(nn.Module):
    """Two raw parameters around two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.u = (nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))
        self.lin, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(x @ self.v.T @ self.u.T))


class Block(nn.Module):
    """A raw parameter, two layers and a module with raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) / 3)
        self.lin, self.inner, self.other = nn.Linear(8, 8), Inner(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.inner(self.lin(x @ self.w.T)))


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block()).eval()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
AROUND = {
    "one parameter": (["0.w"], {}),
    "two parameters": (["v", "u"], {}),
    "a module in full": (["0.w"], {"modules_to_save": ["norm"]}),
    "all biases": (["0.w"], {"bias": "all"}),
    "biases of adapted layers": (["v", "u"], {"bias": "lora_only"}),
    "ranks": (["v", "u"], {"rank_pattern": {"inner.lin": 5, "inner.v": 2}, "alpha_pattern": {"lin": 3}}),
}


@pytest.mark.parametrize("case", AROUND)
def test_layers_inside_a_module_whose_raw_parameters_are_adapted(tmp_path: Path, case: str) -> None:
    """PEFT wraps the module, so that its layers have other paths in the file."""
    parameters, options = AROUND[case]
    expected = adapted(block(), tmp_path / "a", ["lin"], parameters, **options)(X)
    model = dw.load(block(), tmp_path / "a")
    torch.testing.assert_close(model(X), expected)
    assert not torch.allclose(block()(X), expected, atol=1e-2)
    dw.save(model, tmp_path / "b")  # PEFT would look for what lies inside under other names
    assert peft_type(tmp_path / "b") == "DELTAW"
    assert torch.equal(dw.load(block(), tmp_path / "b")(X), model(X))


def test_two_tensors_of_one_layer_are_refused(tmp_path: Path) -> None:
    adapted(block(), tmp_path / "a", ["lin"], ["0.w"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(
        {k.replace("0.base_layer.inner", "0.inner"): t for k, t in load_file(file).items()} | load_file(file), file
    )
    with pytest.raises(AdapterError, match=r"two tensors of the file mean '0.inner.lin.lora_A.weight'"):
        dw.load(block(), tmp_path / "a")


TURNED = {
    "mlp": ["c_fc.weight", "mlp.c_proj.weight"],
    "square": ["attn.c_proj.weight"],
    "embedding": ["wpe.weight"],
    "as stored": ["lm_head.weight"],
}


@pytest.mark.parametrize("case", TURNED)
def test_raw_parameters_of_layers_that_store_their_matrix_the_other_way_round(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=4, n_inner=24)).eval()
    expected = adapted(base, tmp_path / "a", [], TURNED[case])(IDS).logits
    assert not torch.allclose(base(IDS).logits, expected, atol=1e-2)
    dw.write(dw.read(tmp_path / "a"), tmp_path / "b", grammar="PEFT")
    for source in (tmp_path / "a", dw.read(tmp_path / "a"), tmp_path / "b"):
        model = dw.load(copy.deepcopy(base), source)
        torch.testing.assert_close(model(IDS).logits, expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected)
    dw.save(model, tmp_path / "c")
    torch.testing.assert_close(dw.load(copy.deepcopy(base), tmp_path / "c")(IDS).logits, expected)
