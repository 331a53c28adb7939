"""A tiny real Llama (random weights, one token per byte, a chat template), and conversations that it can learn."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*marks, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def make_chat_model(folder: Path, **changed: object) -> Path:
    """An HF folder with config, weights and tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**shape, **changed})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_talks(path: Path, count: int = 60) -> Path:
    """Questions about letters, each answered by the letter twice; as messages."""
    rows = []
    for i in range(count):
        letter = "abcdefghij"[i % 10]
        asked = {"role": "user", "content": f"{letter} number {i}"}
        rows.append({"messages": [asked, {"role": "assistant", "content": letter * 2}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
