"""Encoders from transformers and from openai-whisper are the same; a shorter context changes nothing but the length."""

from __future__ import annotations

import re

import pytest
import torch

from deltaw.errors import ConfigError, DataError
from deltaw.training.whisper import NAMES, cut_context, empty_encoder, whisper_encoder

pytest.importorskip("transformers")
SHAPE = {
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": 30,
}


def openai_checkpoint(encoder):
    """What openai-whisper would have saved: the same tensors under its names (the inverse of ours, by search)."""
    heads = {"layers": "blocks"}
    state = {}
    for key, tensor in encoder.state_dict().items():
        name = key
        for ours, theirs in (
            ("self_attn_layer_norm", "attn_ln"),
            ("final_layer_norm", "mlp_ln"),
            ("self_attn.q_proj", "attn.query"),
            ("self_attn.k_proj", "attn.key"),
            ("self_attn.v_proj", "attn.value"),
            ("self_attn.out_proj", "attn.out"),
            ("fc1", "mlp.0"),
            ("fc2", "mlp.2"),
            ("embed_positions.weight", "positional_embedding"),
        ):
            name = name.replace(ours, theirs)
        name = re.sub(r"^layers\.", f"{heads['layers']}.", name)
        name = re.sub(r"^layer_norm\.", "ln_post.", name)
        state[f"encoder.{name}"] = tensor.clone()
    state["decoder.token_embedding.weight"] = torch.zeros(3, 16)
    dims = {"n_mels": 8, "n_audio_ctx": 30, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2, "n_vocab": 3}
    return {"dims": dims, "model_state_dict": state}


def test_an_openai_checkpoint_is_the_same_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = empty_encoder(SHAPE).eval()
    torch.save(openai_checkpoint(encoder), tmp_path / "tiny.pt")
    loaded, where = whisper_encoder(str(tmp_path / "tiny.pt"))
    mel = torch.randn(2, 8, 60)
    assert torch.equal(loaded.eval()(mel).last_hidden_state, encoder(mel).last_hidden_state)
    assert "openai-whisper" in where
    assert len(NAMES) == 12


def test_openai_whispers_own_module_gives_the_same_numbers(tmp_path):
    whisper = pytest.importorskip("whisper", reason="the package openai-whisper is not installed")
    torch.manual_seed(0)
    theirs = whisper.model.AudioEncoder(8, 30, 16, 2, 2).eval()
    dims = {"n_mels": 8, "n_audio_ctx": 30, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2}
    state = {f"encoder.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "tiny.pt")
    ours, _ = whisper_encoder(str(tmp_path / "tiny.pt"))
    mel = torch.randn(2, 8, 60)
    assert torch.allclose(ours.eval()(mel).last_hidden_state, theirs(mel), atol=1e-5)


def test_a_cut_context_keeps_the_first_positions():
    torch.manual_seed(0)
    encoder = empty_encoder(SHAPE).eval()
    before = encoder.embed_positions.weight[:5].clone()
    cut_context(encoder, 5)
    assert torch.equal(encoder.embed_positions.weight, before)
    assert encoder(torch.randn(3, 8, 10)).last_hidden_state.shape == (3, 5, 16)


def test_a_signal_that_is_too_long_is_refused_and_leaves_the_encoder_alone():
    encoder = empty_encoder(SHAPE)
    with pytest.raises(ConfigError, match="62 frames long, the model takes 60"):
        cut_context(encoder, 31)
    assert encoder.embed_positions.num_embeddings == 30


def test_other_models_and_files_are_refused_with_the_reason(tmp_path):
    (tmp_path / "wrong.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DataError, match="no checkpoint"):
        whisper_encoder(str(tmp_path / "wrong.pt"))
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="'dims' and 'model_state_dict'"):
        whisper_encoder(str(tmp_path / "other.pt"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="is a bert, not a Whisper"):
        whisper_encoder(str(tmp_path / "bert"))
