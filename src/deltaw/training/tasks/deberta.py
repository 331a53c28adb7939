"""DeBERTa-v3 (arXiv:2111.09543) with random weights, from its configuration alone, as a text classifier.

Its tokenizer and weights need the hub; its shape does not. The weights are a function of (size, seed), so an adapter kept
for them can be opened again: the fingerprint says whether they are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from deltaw.errors import ConfigError
from deltaw.training.config import RunConfig
from deltaw.training.tasks.text_classification import TextClassification

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    "small": {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
"""tiny is ours, for quick runs; the others are the published ones."""
VOCABULARY = 128_100


def deberta_config(size: str, classes: int = 2, **other: Any) -> Any:
    """The published configuration of microsoft/deberta-v3-`size`, as a DebertaV2Config; `other` overrides its keys."""
    from transformers import DebertaV2Config

    shape = SIZES[size]
    published = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "layer_norm_eps": 1e-7,
        "position_biased_input": False,
        "max_relative_positions": -1,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": shape["hidden_size"],
        "num_labels": classes,
    }
    return DebertaV2Config(**{**published, **shape, **other})


class DebertaFromConfig(TextClassification):
    """Sentences and their classes, for a DeBERTa-v3 that starts from nothing.

    size: one of SIZES. tokenizer: hub id or folder whose tokenizer cuts the texts.
    """

    def __init__(
        self,
        config: RunConfig,
        size: str,
        tokenizer: str,
        label_names: Mapping[str, str] | None = None,
        labels: Sequence[str] | None = None,
        read: Literal["splits", "whole", "no"] = "splits",
    ) -> None:
        self.size, self.tokenizer_name = size, tokenizer
        super().__init__(config.model_copy(update={"model": tokenizer}), label_names, labels, read)
        self.model_name = f"deberta-v3-{size} from its configuration, seed {config.seed}"
        self.notes[0] = f"model: {self.model_name}; tokenizer of {tokenizer}"
        if len(self.tokenizer) > VOCABULARY:
            raise ConfigError(
                f"the tokenizer of {tokenizer} has {len(self.tokenizer):,} tokens, the model {VOCABULARY:,}"
            )

    def build(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        drop = self.config.base_dropout
        given: dict[str, Any] = {
            "pad_token_id": self.pad,
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }
        if self.size == "tiny":
            given["vocab_size"] = len(self.tokenizer)
        if drop is not None:
            given |= {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
        torch.manual_seed(self.config.seed)
        model: Any = AutoModelForSequenceClassification.from_config(
            deberta_config(self.size, len(self.labels), **given)
        )
        model.config._name_or_path = self.model_name
        self.model_type = model.config.model_type
        return model  # type: ignore[no-any-return]

    def new_modules(self, model: nn.Module) -> list[str]:
        """The classifier, as the seed does; the pooler before it stays as it was drawn."""
        return ["classifier"]

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "size": self.size,
            "tokenizer": self.tokenizer_name,
            "seed": self.config.seed,
        }
