"""Adapters that PEFT made on many architectures give the same outputs here, and those saved here give them in PEFT.

A few architectures run by default, every one of `architectures.NAMES` with `-m slow`, each with several kinds of adapter.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import deltaw as dw
from tests.parity.architectures import NAMES, build, output, repeated_layers
from tests.parity.test_peft_files_grid import shaken

DEFAULT = ("Llama", "GPT2", "Phi", "T5", "DebertaV2", "ViT", "Wav2Vec2", "Mixtral", "Llava", "LlamaSeqCls")
EVERY = [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora and biases": {"use_rslora": True, "bias": "all"},
    "second block": {"layers_to_transform": [1]},
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within the roundings of two deep models whose sums run in another order."""
    return bool((ours - theirs).abs().max() <= 5e-5 * theirs.abs().max())


def again(base: nn.Module, folder: Path) -> nn.Module:
    """The adapter as PEFT reads it, which must find all that it looks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval().base_model.model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", [k if k == "lora" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_peft_and_back(tmp_path: Path, name: str, kind: str) -> None:
    base, inputs = build(name)
    names = [n for n in repeated_layers(base) if n != "router"]  # PhiMoE's gives a tuple, on which PEFT's LoRA fails
    if name.startswith("Deepseek"):  # PEFT takes gate_proj and its like for the experts
        names = [n for n in names if n.endswith(("q_a_proj", "q_b_proj", "o_proj"))]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[names[0], names[-1]], init_lora_weights=False, **KINDS[kind]
    )
    try:
        theirs = shaken(peft.get_peft_model(copy.deepcopy(base), config))
    except ValueError as refused:  # PEFT finds no numbered blocks, or cannot adapt a module of the model
        pytest.skip(str(refused)[:80])
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = output(theirs.base_model.model, inputs)
    assert not close(output(base, inputs), expected)

    ours = dw.load(copy.deepcopy(base), tmp_path / "theirs")
    assert close(output(ours, inputs), expected)
    dw.save(ours, tmp_path / "ours")
    assert close(output(again(base, tmp_path / "ours"), inputs), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_life(tmp_path: Path, name: str) -> None:
    """attach, one step, merge, unmerge, save, load, detach: on every linear layer."""
    base, inputs = build(name)
    base.requires_grad_(False)  # torch chooses kernels by it
    model = copy.deepcopy(base)
    start = output(model, inputs)
    dw.attach(model, dw.LoRA(rank=2), "all-linear")
    assert torch.equal(output(model, inputs), start)
    shaken(model)
    changed = output(model, inputs)
    assert not close(start, changed)
    dw.merge(model)
    assert close(output(model, inputs), changed)
    dw.unmerge(model)
    assert torch.equal(output(model, inputs), changed)
    dw.save(model, tmp_path / "a")
    assert torch.equal(output(dw.load(copy.deepcopy(base), tmp_path / "a"), inputs), changed)
    dw.detach(model)
    assert torch.equal(output(model, inputs), start)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Phi", pytest.param("XLNet", marks=pytest.mark.slow)])
def test_embeddings_that_peft_saves_unasked(tmp_path: Path, name: str) -> None:
    """After a vocabulary was resized: both embeddings in full, the head with its bias."""
    base, inputs = build(name)
    config = peft.LoraConfig(r=2, target_modules=repeated_layers(base)[:1], init_lora_weights=False)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ours = dw.load(copy.deepcopy(base), tmp_path / "a")
    assert close(output(ours, inputs), output(theirs.base_model.model, inputs))
