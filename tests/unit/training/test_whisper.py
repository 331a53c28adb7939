"""Encoders from transformers and from openai-whisper are the same; a shorter context changes nothing but the length."""

from __future__ import annotations

import sys

import pytest
import torch

from deltaw.errors import ConfigError, DataError, MissingExtra
from deltaw.training.whisper import NAMES, cut_context, empty_encoder, from_openai, whisper_encoder

pytest.importorskip("transformers")
SHAPE = {
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": 30,
}


@pytest.fixture
def theirs(tmp_path):
    """A model of openai-whisper's own class, and a checkpoint as that package reads it."""
    whisper = pytest.importorskip("whisper", reason="the package openai-whisper is not installed")
    dims = {"n_mels": 8, "n_audio_ctx": 30, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2}
    dims |= {"n_vocab": 12, "n_text_ctx": 8, "n_text_state": 16, "n_text_head": 2, "n_text_layer": 1}
    torch.manual_seed(0)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).eval()
    torch.nn.init.normal_(model.encoder.conv1.bias)
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    return model, tmp_path / "tiny.pt"


@torch.no_grad()
def test_openai_whispers_own_models_give_the_same_numbers(theirs):
    model, file = theirs
    mel = torch.randn(2, 8, 60)
    expected = model.encoder(mel)
    loaded, where = whisper_encoder(str(file))
    for ours in (from_openai(model), loaded):
        assert torch.allclose(ours.eval()(mel).last_hidden_state, expected, atol=1e-5)
    assert "openai-whisper" in where
    assert len(NAMES) == 12


def test_without_their_package_the_way_out_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "whisper", None)
    (tmp_path / "small.pt").write_bytes(b"")
    for name in ("openai:small", str(tmp_path / "small.pt")):
        with pytest.raises(MissingExtra, match=r"pip install openai-whisper; or give .* model=openai/whisper-small"):
            whisper_encoder(name)
    with pytest.raises(DataError, match="no such file"):
        whisper_encoder(str(tmp_path / "none.pt"))


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


def test_other_files_are_refused_with_the_reason(theirs, tmp_path):
    (tmp_path / "wrong.pt").write_bytes(b"no checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("wrong.pt", "other.pt"):
        with pytest.raises(DataError, match="openai-whisper cannot load it"):
            whisper_encoder(str(tmp_path / name))
    with pytest.raises(DataError, match="has no 'smal'; did you mean 'small"):
        whisper_encoder("openai:smal")


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="is a bert, not a Whisper"):
        whisper_encoder(str(tmp_path / "bert"))
