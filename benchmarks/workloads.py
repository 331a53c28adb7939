"""The three models that the claims are measured on, each with one fixed batch and a loss whose gradient is not zero.

Widths and depths are the real models'; weights are random unless the real ones lie at hand, which no timing depends on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, DebertaV2Config, LlamaConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks.measure import SEED


@dataclass(frozen=True)
class Workload:
    """A model, what is adapted in it, the module whose input is the first activation, and the loss of one batch."""

    name: str
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    first_block: str
    loss: Callable[[nn.Module], Tensor]


def projected(hidden: Tensor) -> Tensor:
    """A loss with a dense gradient: the mean of the hidden states times fixed noise, curved so that it can be trained."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(SEED))
    return (hidden.float() * noise).mean() + 1e-2 * hidden.float().pow(2).mean()


def copies_of(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Like `make`, but the weights are drawn once: what one contender does not change is not made again for the next."""
    made = functools.cache(make)
    return lambda: copy.deepcopy(made())


def whisper_tiny(frames: int = 200, batch: int = 16) -> Workload:
    """The encoder of whisper-tiny, `frames` positions x `batch`."""

    @copies_of
    def build() -> nn.Module:
        torch.manual_seed(SEED)
        config = WhisperConfig(
            d_model=384,
            encoder_layers=4,
            encoder_attention_heads=6,
            encoder_ffn_dim=1536,
            max_source_positions=frames,
            attn_implementation="sdpa",
        )
        return WhisperEncoder(config)

    mel = torch.randn(batch, 80, 2 * frames, generator=torch.Generator().manual_seed(SEED))
    return Workload(
        f"whisper-tiny encoder T={frames}x{batch}",
        build,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "layers.0",
        lambda model: projected(model(mel).last_hidden_state),
    )


def minilm(length: int = 128, batch: int = 8) -> Workload:
    """all-MiniLM-L6: BERT with 6 layers of width 384."""

    @copies_of
    def build() -> nn.Module:
        torch.manual_seed(SEED)
        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        return BertModel(config, add_pooling_layer=False)

    ids = torch.randint(0, 30000, (batch, length), generator=torch.Generator().manual_seed(SEED))
    return Workload(
        f"MiniLM {length}x{batch}",
        build,
        ("query", "key", "value", "dense"),
        "encoder.layer.0",
        lambda model: projected(model(input_ids=ids).last_hidden_state),
    )


def smollm2(length: int = 256, batch: int = 2) -> Workload:
    """SmolLM2-135M: Llama with 30 layers of width 576, tied head, next-token loss."""

    @copies_of
    def build() -> nn.Module:
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return AutoModelForCausalLM.from_config(config)

    ids = torch.randint(0, 49152, (batch, length), generator=torch.Generator().manual_seed(SEED))
    return Workload(
        f"SmolLM2-135M {length}x{batch}",
        build,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "model.layers.0",
        lambda model: model(input_ids=ids, labels=ids).loss,
    )


def deberta_config(width: int, layers: int) -> DebertaV2Config:
    """DeBERTa-v3's of that size, with a small vocabulary and without dropout."""
    return DebertaV2Config(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        max_relative_positions=-1,
        position_biased_input=False,
        type_vocab_size=0,
    )


def all_workloads() -> list[Workload]:
    """The three of the claims."""
    return [whisper_tiny(), minilm(), smollm2()]
