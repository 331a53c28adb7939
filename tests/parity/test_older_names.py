"""Adapters made under transformers 4 on models whose modules transformers 5 renamed, or whose experts it stacked.

The oracle is transformers itself: it reads the old checkpoint with ΔW added to its weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw as dw
from deltaw.errors import AdapterError
from deltaw.io.notices import AdapterNotice
from tests.parity.architectures import build, output

CASES = [
    ("ViT", ["query", "value"]),
    ("Swin", ["query", "value", "dense"]),
    ("Segformer", ["query", "value"]),
    ("GPTNeoX", ["embed_out"]),
    ("Llava", ["q_proj", "v_proj"]),
    ("Gemma3", ["q_proj"]),
    ("Qwen2VL", ["q_proj", "qkv"]),
    ("Mixtral", ["q_proj", "w1", "w2", "w3"]),
    ("Mixtral", ["w1"]),
    ("Qwen2Moe", ["gate_proj", "up_proj", "down_proj"]),
    ("Olmoe", ["down_proj"]),
]


def old_adapter(model: torch.nn.Module, folder: Path, names: list[str]) -> torch.nn.Module:
    """Writes the adapter to `folder`, and returns the model with its change added."""
    model.save_pretrained(folder / "old")  # type: ignore[operator]  # transformers writes its old names
    weights = load_file(folder / "old" / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for key in [k for k in weights if k.removesuffix(".weight").rpartition(".")[2] in names]:
        out, columns = weights[key].shape
        A, B = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, columns), (out, 2)))
        path = f"base_model.model.{key.removesuffix('.weight')}"
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        weights[key] = weights[key] + 3 * B @ A
    assert tensors
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": names, "lora_dropout": 0.05}
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    save_file(weights, folder / "old" / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(folder / "old").eval()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_taken_over_exactly(tmp_path: Path, name: str, targets: list[str]) -> None:
    base, inputs = build(name)
    expected = output(old_adapter(base, tmp_path, targets), inputs)
    ours = copy.deepcopy(base)
    with pytest.warns(AdapterNotice, match="other names"):
        dw.load(ours, tmp_path / "adapter")
    scale = expected.abs().max()
    assert (output(ours, inputs) - expected).abs().max() < 2e-5 * scale
    assert (output(base, inputs) - expected).abs().max() > 1e-3 * scale
    dw.save(ours, tmp_path / "new")
    assert torch.equal(output(dw.load(copy.deepcopy(base), tmp_path / "new"), inputs), output(ours, inputs))


@pytest.mark.filterwarnings("ignore")
def test_incomplete_is_refused(tmp_path: Path) -> None:
    base, _ = build("ViT")
    old_adapter(base, tmp_path, ["query"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if ".layer.0." in k}, file)
    with pytest.raises(AdapterError, match=r"layers\.1\.attention\.q_proj.*incomplete"):
        dw.load(base, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_names_that_no_rule_knows_are_refused_as_ever(tmp_path: Path) -> None:
    base, _ = build("ViT")
    old_adapter(base, tmp_path, ["query"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k.replace("query", "quarry"): t for k, t in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="quarry"):
        dw.load(base, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_tensors_named_as_in_a_state_dict(tmp_path: Path) -> None:
    """`.default.` in the names; of two adapters at once it is refused."""
    base, inputs = build("Llama")
    expected = output(old_adapter(base, tmp_path, ["q_proj"]), inputs)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    plain = load_file(file)
    save_file({k.replace(".weight", ".default.weight"): t for k, t in plain.items()}, file)
    ours = dw.load(copy.deepcopy(base), tmp_path / "adapter")
    assert (output(ours, inputs) - expected).abs().max() < 2e-5 * expected.abs().max()
    both = {k.replace(".weight", f".{n}.weight"): t.clone() for n in ("one", "two") for k, t in plain.items()}
    save_file(both, file)
    with pytest.raises(AdapterError, match="one, two"):
        dw.load(copy.deepcopy(base), tmp_path / "adapter")
