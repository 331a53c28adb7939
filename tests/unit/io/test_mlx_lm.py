"""Our MLX export in mlx-lm itself, really run where it is installed: it computes what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import deltaw as dw
from deltaw.cli.app import app
from tests.unit.io.adapter_folders import shaken

PROMPT = [[1, 7, 12, 20, 3, 9, 15, 5]]
CHANGES: dict[str, Any] = {
    "lora": {"q_proj|v_proj|down_proj": dw.LoRA(rank=3, alpha=12)},
    "last block": {
        "layers.2.self_attn.q_proj": dw.LoRA(rank=2, alpha=3),
        "layers.2.mlp.up_proj": dw.LoRA(rank=2, alpha=3),
    },
    "middle block": {"layers.1.self_attn.k_proj": dw.LoRA(rank=2, alpha=8)},
    "head": {"lm_head|layers.0.mlp.up_proj": dw.LoRA(rank=2, alpha=8)},
    "dora": {"q_proj|o_proj": dw.DoRA(rank=2, alpha=4)},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_mlx_lm_computes_what_we_compute(tmp_path: Path, kind: str) -> None:
    mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed")
    tuner: Any = pytest.importorskip("mlx_lm.tuner.utils", reason="mlx-lm is not installed")
    llama: Any = pytest.importorskip("mlx_lm.models.llama")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=40, tie_word_embeddings=False, **sizes)
    model: Any = LlamaForCausalLM(config).eval()
    weights = {k: mx.array(v.numpy()) for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(torch.tensor(PROMPT)).logits
    dw.attach(model, CHANGES[kind])
    with torch.no_grad():
        expected = shaken(model)(torch.tensor(PROMPT)).logits
    dw.save(model, tmp_path / "adapter")
    command = ["convert", str(tmp_path / "adapter"), "--to", "mlx", "--out", str(tmp_path / "mlx")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output

    told = {"model_type": "llama", "vocab_size": 40, "rms_norm_eps": config.rms_norm_eps, "rope_theta": 10000.0}
    theirs = llama.Model(llama.ModelArgs.from_dict({**told, **sizes, "tie_word_embeddings": False}))
    theirs.load_weights(list(weights.items()))
    theirs.eval()
    np.testing.assert_allclose(np.array(theirs(mx.array(PROMPT))), plain.numpy(), rtol=1e-5, atol=1e-5)
    tuner.load_adapters(theirs, str(tmp_path / "mlx"))
    theirs.eval()
    np.testing.assert_allclose(np.array(theirs(mx.array(PROMPT))), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2
