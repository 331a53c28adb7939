"""A tiny real BERT (random weights, its own word list) and a small sentiment data set that it can learn."""

from __future__ import annotations

import csv
import random
from pathlib import Path

GOOD = ("wonderful", "brilliant", "moving", "funny")
BAD = ("dull", "boring", "awful", "tedious")
PLAIN = ("a", "the", "film", "story", "actor", "and", "is", "very", "with", "music", "scene", "it")


def make_model(folder: Path) -> Path:
    """An HF folder with config, weights and tokenizer; no classifier in the weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PLAIN, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_data(path: Path, count: int = 160, seed: int = 0) -> Path:
    """A csv with text and label, both classes, no duplicates."""
    chance = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        good = len(rows) % 2 == 0
        words = [chance.choice(PLAIN) for _ in range(chance.randint(3, 12))]
        words.insert(chance.randrange(len(words)), chance.choice(GOOD if good else BAD))
        rows[" ".join(words)] = "good" if good else "bad"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows.items())
    return path
