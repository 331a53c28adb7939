"""`deltaw inspect`, `check`, `doctor`, `convert` and `extract` on a small transformers model in a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import deltaw as dw
from deltaw.cli.app import app
from deltaw.errors import AdapterError

Deltaw = Callable[..., Any]


@pytest.fixture
def deltaw(capsys: pytest.CaptureFixture[str]) -> Deltaw:
    def call(*words: str, code: int = 0) -> str:
        found = 0
        try:
            found = app([str(w) for w in words], standalone_mode=False) or 0
        except typer.Exit as stop:
            found = stop.exit_code
        assert found == code
        return capsys.readouterr().out

    return call


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, adapter, fully tuned model)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    dw.attach(model, {"q_proj": dw.LoRA(rank=2), "v_proj": dw.LoRA(rank=4)})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    dw.save(model, tmp_path / "adapter")
    dw.merge(model, keep=None)
    dw.detach(model)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "tuned"


def test_inspect(deltaw: Deltaw, folders: tuple[Path, Path, Path]) -> None:
    _, adapter, _ = folders
    assert "q_proj x2, v_proj x2" in deltaw("inspect", adapter)
    facts = json.loads(deltaw("inspect", adapter, "--json"))
    assert facts["weights"] == 4
    assert facts["readers"]["vllm"].startswith("misreads: rank_pattern")


def test_check_and_export(deltaw: Deltaw, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = folders
    assert "fits the base" in deltaw("check", adapter, "--base", base)
    out = deltaw("check", adapter, "--base", base, "--for", "vllm", code=2)
    assert "misreads it" in out
    deltaw("check", adapter, "--base", base, "--for", "vllm", "--out", tmp_path / "served")
    assert "vllm: reads it" in deltaw("check", tmp_path / "served", "--base", base, "--for", "vllm")
    with pytest.raises(AdapterError, match="did you mean 'vllm'"):
        deltaw("check", adapter, "--for", "vlm")


def test_doctor(deltaw: Deltaw, folders: tuple[Path, Path, Path]) -> None:
    base, adapter, _ = folders
    assert "changes the output by" in deltaw("doctor", adapter, "--base", base)
    model = LlamaForCausalLM.from_pretrained(base)
    dw.attach(model, dw.LoRA(rank=2), ["q_proj"])
    dw.save(model, adapter.parent / "fresh")
    out = deltaw("doctor", adapter.parent / "fresh", "--base", base, code=2)
    assert "changes nothing" in out
    assert out.count("dead:") == 2


@pytest.mark.parametrize("to", ["kohya", "gguf", "diffusers", "safetensors", "mlx"])
def test_convert(deltaw: Deltaw, folders: tuple[Path, Path, Path], tmp_path: Path, to: str) -> None:
    base, adapter, _ = folders
    if to == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / {"gguf": "a.gguf", "mlx": "a"}.get(to, "a.safetensors")
    deltaw("convert", adapter, "--to", to, "--out", out, "--base", base, *(["--uniform"] if to == "mlx" else []))
    deltaw("convert", out, "--to", "peft", "--out", tmp_path / "back", "--base", base)
    one, two = dw.read(adapter), dw.read(tmp_path / "back")
    for key, change in one.changes.items():
        assert torch.allclose(change.delta_weight(), two.changes[key].delta_weight(), atol=1e-6)
    with pytest.raises(AdapterError, match="exists"):
        deltaw("convert", adapter, "--to", to, "--out", out, "--base", base, *(["--uniform"] if to == "mlx" else []))


def test_extract(deltaw: Deltaw, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, tuned = folders
    said = deltaw("extract", tuned, "--base", base, "--rank", "4", "--out", tmp_path / "got")
    assert "relative error at most" in said
    model = dw.load(LlamaForCausalLM.from_pretrained(base), tmp_path / "got").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        full = LlamaForCausalLM.from_pretrained(tuned).eval()(ids).logits
        assert torch.allclose(model(ids).logits, full, atol=1e-4)
    error = json.loads(deltaw("extract", tuned, "--base", base, "--rank", "1", "--out", tmp_path / "one", "--json"))[
        "error"
    ]
    assert all(0 < e < 1 for e in error.values())
