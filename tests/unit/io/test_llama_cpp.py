"""Our GGUF export in llama.cpp itself, really run where it is installed: its probabilities with the adapter are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import deltaw as dw
from deltaw.cli.app import app
from tests.unit.io.adapter_folders import shaken

PROMPT = [1, 70, 12, 200, 33, 91, 150, 5, 77]
VOCABULARY = 3 + 256  # <unk>, <s>, </s> and one token per byte
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
TARGETS: dict[Any, Any] = {
    "q_proj|k_proj": dw.LoRA(rank=2, alpha=6),
    "v_proj|o_proj|up_proj|down_proj": dw.LoRA(rank=3, alpha=24),
}


def model_of(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config, model = classes[kind]
    torch.manual_seed(0)
    return model(config(**SIZES)).eval()


def write_base(model: nn.Module, kind: str, path: Path) -> None:
    """`model` as llama.cpp's GGUF, in fp32: llama's q and k with the halves of every head interleaved."""
    gguf: Any = pytest.importorskip("gguf")
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(number, 2)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)  # type: ignore[union-attr,arg-type]
    writer.add_rope_dimension_count(16)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<0x{n:02X}>".encode() for n in range(256))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *([1] * 256)])  # plain texts: half characters would not be answered one by one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = 4 if ".q_proj." in name else 2
            rows = torch.arange(len(values)).reshape(heads, 2, 8).transpose(1, 2).reshape(-1)
            values = values[rows]
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(llama: Any, base: Path, adapter: Path | None) -> tuple[list[int], Tensor]:
    """Eight greedy tokens, and the log-probabilities of the first over the vocabulary."""
    wanted = llama.CommonParams()
    wanted.model.path = str(base)
    wanted.n_ctx, wanted.warmup, wanted.cpuparams.n_threads, wanted.verbosity = 64, False, 1, 0
    wanted.n_parallel = 1
    wanted.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.cache_type_k = wanted.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        wanted.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = llama.Server(wanted)
    asked = {"prompt": PROMPT, "n_predict": 8, "temperature": 0, "n_probs": VOCABULARY, "return_tokens": True}
    asked |= {"ignore_eos": False, "cache_prompt": False}
    content = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    first = torch.full((VOCABULARY,), float("nan"))
    for each in content[0]["top_logprobs"]:
        first[each["id"]] = each["logprob"]
    return [each["id"] for each in content], first


def ours(model: nn.Module) -> tuple[list[int], Tensor]:
    tokens = list(PROMPT)
    with torch.no_grad():
        first = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        while len(tokens) < len(PROMPT) + 8:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 2:
                break
    return tokens[len(PROMPT) :], first


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_we_compute(tmp_path: Path, kind: str) -> None:
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    write_base(model, kind, tmp_path / "base.gguf")
    plain_tokens, plain = ours(model)
    dw.attach(model, TARGETS)
    shaken(model)
    dw.save(model, tmp_path / "adapter")
    tokens, expected = ours(model)
    command = ["convert", str(tmp_path / "adapter"), "--to", "gguf", "--out", str(tmp_path / "adapter.gguf")]
    result = CliRunner().invoke(app, [*command, "--base", str(tmp_path / "base")])
    assert result.exit_code == 0, result.output

    for adapter, greedy, logs in ((None, plain_tokens, plain), (tmp_path / "adapter.gguf", tokens, expected)):
        their_tokens, theirs = run(llama, tmp_path / "base.gguf", adapter)
        assert their_tokens == greedy
        np.testing.assert_allclose(theirs.numpy(), logs.numpy(), atol=2e-3)  # llama.cpp multiplies in fewer bits
    assert (expected - plain).abs().max() > 0.1
