"""The claims S1 to S5 and S7 on eight models that nothing was tuned on, from the smallest to ten times those of the claims,
and two with convolutions, for which no target was set.

Random weights of the real widths; the same contenders, targets and rounds as the claims. Not part of `make bench` (it takes
twenty minutes): `python -m benchmarks.other_models [name ...]` writes docs/results/other-models.md.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DebertaV2Model,
    GPT2Config,
    Qwen2Config,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks import methods
from benchmarks import s7_memory as memory
from benchmarks.measure import SEED, Times, alternate, machine, ratio
from benchmarks.table import machine_of
from benchmarks.workloads import Workload, deberta_config, projected

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "other-models.md"
ROUNDS = 5
WITHOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make` from one seed."""

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        return make()

    return build


def noise(*shape: int) -> Tensor:
    """A batch of numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def tokens(vocabulary: int, *shape: int) -> Tensor:
    """A batch of tokens."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(SEED))


def hidden(name: str, make: Callable[[], nn.Module], targets: Sequence[str], first: str, **inputs: Tensor) -> Workload:
    """An encoder whose last hidden state is projected on noise."""
    return Workload(name, seeded(make), tuple(targets), first, lambda m: projected(m(**inputs).last_hidden_state))


def language(name: str, config: Any, targets: Sequence[str], first: str, ids: Tensor) -> Workload:
    """A causal language model with its own loss."""
    make = seeded(lambda: AutoModelForCausalLM.from_config(config))
    return Workload(name, make, tuple(targets), first, lambda m: m(input_ids=ids, labels=ids).loss)


def bert() -> Workload:
    """BERT-base."""
    config = BertConfig(**WITHOUT, attn_implementation="sdpa")
    targets, ids = ("query", "key", "value", "dense"), tokens(30000, 8, 128)
    return hidden(
        "BERT-base 128x8", lambda: BertModel(config, add_pooling_layer=False), targets, "encoder.layer.0", input_ids=ids
    )


def gpt2() -> Workload:
    """GPT-2, whose layers are Conv1D."""
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa")
    return language("GPT-2 256x2", config, ("c_attn", "c_proj", "c_fc"), "transformer.h.0", tokens(50000, 2, 256))


def whisper() -> Workload:
    """The encoder of whisper-small."""
    config = WhisperConfig(
        d_model=768,
        encoder_layers=12,
        encoder_attention_heads=12,
        encoder_ffn_dim=3072,
        max_source_positions=200,
        attn_implementation="sdpa",
    )
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    mel = noise(4, 80, 400)
    return hidden(
        "whisper-small encoder T=200x4", lambda: WhisperEncoder(config), targets, "layers.0", input_features=mel
    )


def vit() -> Workload:
    """ViT-base."""
    config = ViTConfig(attn_implementation="sdpa")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    return hidden(
        "ViT-base 197x4",
        lambda: ViTModel(config, add_pooling_layer=False),
        targets,
        "layers.0",
        pixel_values=noise(4, 3, 224, 224),
    )


def deberta() -> Workload:
    """DeBERTa-v3-base, with a small vocabulary."""
    config = deberta_config(768, 12)
    targets = ("query_proj", "key_proj", "value_proj", "dense")
    return hidden(
        "DeBERTa-v3-base 128x8",
        lambda: DebertaV2Model(config),
        targets,
        "encoder.layer.0",
        input_ids=tokens(1000, 8, 128),
    )


def qwen() -> Workload:
    """Qwen2-0.5B."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return language("Qwen2-0.5B 256x1", config, targets, "model.layers.0", tokens(151936, 1, 256))


def perceptron() -> Workload:
    """A multi-layer perceptron over many rows."""
    x = noise(4096, 256)

    def make() -> nn.Module:
        widths = (256, 1024, 1024, 1024, 64)
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
        return nn.Sequential(*layers[:-1])

    return Workload(
        "MLP 256-1024-1024-1024-64 x4096", seeded(make), ("0", "2", "4", "6"), "0", lambda m: projected(m(x))
    )


def small_perceptron() -> Workload:
    """Seed 000's perceptron, which has more of Python than of products."""
    x, labels = noise(64, 784), tokens(10, 64)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))

    return Workload(
        "MLP 784-128-256-10 x64",
        seeded(make),
        ("0", "2", "4"),
        "0",
        lambda m: nn.functional.cross_entropy(m(x), labels),
    )


def resnet() -> Workload:
    """ResNet-50, all convolutions adapted."""
    x = noise(4, 3, 128, 128)
    make = seeded(lambda: ResNetModel(ResNetConfig()))
    return Workload(
        "ResNet-50 128x128 x4", make, ("convolution",), "encoder.stages.0", lambda m: projected(m(x).last_hidden_state)
    )


def strain() -> Workload:
    """Convolutions in one dimension, as they begin a network for time series."""
    x = noise(16, 1, 4096)

    def make() -> nn.Module:
        sizes = ((1, 32, 16, 4), (32, 64, 8, 2), (64, 128, 8, 2), (128, 128, 8, 2))
        layers = [m for i, o, k, s in sizes for m in (nn.Conv1d(i, o, k, s), nn.GELU())]
        return nn.Sequential(*layers[:-1])

    return Workload(
        "Conv1d 1-32-64-128-128 4096x16", seeded(make), ("0", "2", "4", "6"), "0", lambda m: projected(m(x))
    )


WORKS = {f.__name__: f for f in (small_perceptron, perceptron, bert, gpt2, whisper, vit, deberta, qwen, resnet, strain)}
CONVOLUTIONS = ("resnet", "strain")
NONE = float("inf")

Found = list[tuple[str, float, float]]
"""(comparison, ratio, target)."""


def times(**contenders: Callable[[], methods.Contender]) -> Times:
    """Seconds of the contenders' steps, taken in turns."""
    made = {name: make() for name, make in contenders.items()}
    steps = {name: c.step for name, c in made.items()}
    once = sum(sum(spent) for spent in alternate(steps, 1, warmup=1).values())
    found = alternate(steps, max(ROUNDS, int(2 / once)), warmup=1)
    made.clear()
    gc.collect()
    return found


def ratios(work: Workload) -> Found:
    """Times of a model with linear layers; losses and gradients are compared first."""
    ours, theirs = methods.deltaw, methods.peft
    methods.agree(ours(work), theirs(work))
    plain = times(
        ours=lambda: ours(work),
        int8=lambda: ours(work, int8=True),
        peft=lambda: theirs(work),
        full=lambda: methods.full(work),
        floor=lambda: methods.floor(work),
    )
    bound = ratio(plain, "floor", "peft")["ratio"]
    drop = times(
        ours=lambda: ours(work, dropout=0.05),
        int8=lambda: ours(work, dropout=0.05, int8=True),
        peft=lambda: theirs(work, dropout=0.05),
    )
    dora = times(ours=lambda: ours(work, dora=True), peft=lambda: theirs(work, dora=True))
    both = times(ours=lambda: ours(work, dora=True, dropout=0.05), peft=lambda: theirs(work, dora=True, dropout=0.05))
    return [
        ("LoRA / PEFT (S1)", ratio(plain, "ours", "peft")["ratio"], max(0.85, 1.08 * bound)),
        ("frozen floor / PEFT", bound, NONE),
        ("with dropout .05 (S2)", ratio(drop, "ours", "peft")["ratio"], 0.60),
        ("DoRA / PEFT's (S3)", ratio(dora, "ours", "peft")["ratio"], 0.72),
        ("with dropout .05 (S3)", ratio(both, "ours", "peft")["ratio"], 0.45),
        ("int8 / PEFT's LoRA (S4)", ratio(plain, "int8", "peft")["ratio"], 0.60),
        ("with dropout .05 (S4)", ratio(drop, "int8", "peft")["ratio"], 0.42),
        ("int8 / full (S5)", ratio(plain, "int8", "full")["ratio"], 0.55),
        ("PEFT's LoRA / full", ratio(plain, "peft", "full")["ratio"], NONE),
    ]


def in_64_bit(contender: methods.Contender) -> methods.Contender:
    """The contender in double precision, its inputs too."""
    contender.model.double()
    contender.model.register_forward_pre_hook(lambda module, args: tuple(x.double() for x in args))
    return contender


def ratios_of_convolutions(work: Workload) -> Found:
    """Times of a model with convolutions, whose weights have no 8-bit products.

    Gradients are compared in 64 bit: ResNet's batch norms amplify roundings of 32 bit by 10^5, PEFT's as ours.
    """
    ours, theirs = methods.deltaw, methods.peft
    methods.agree(in_64_bit(ours(work)), in_64_bit(theirs(work)), 1e-9)
    plain = times(
        ours=lambda: ours(work),
        peft=lambda: theirs(work),
        full=lambda: methods.full(work),
        floor=lambda: methods.floor(work),
    )
    drop = times(ours=lambda: ours(work, dropout=0.05), peft=lambda: theirs(work, dropout=0.05))
    dora = times(ours=lambda: ours(work, dora=True), peft=lambda: theirs(work, dora=True))
    return [
        ("LoRA / PEFT", ratio(plain, "ours", "peft")["ratio"], NONE),
        ("with dropout .05", ratio(drop, "ours", "peft")["ratio"], NONE),
        ("DoRA / PEFT's", ratio(dora, "ours", "peft")["ratio"], NONE),
        ("LoRA / full", ratio(plain, "ours", "full")["ratio"], NONE),
        ("PEFT's LoRA / full", ratio(plain, "peft", "full")["ratio"], NONE),
        ("frozen floor / PEFT", ratio(plain, "floor", "peft")["ratio"], NONE),
    ]


def peaks(name: str) -> Found:
    """Peak memory of a step above the loaded model, with dropout .05, as S7."""
    mib = memory.peaks(f"other_models.{name}", ["deltaw", "deltaw compact", "peft", "full", "floor"])
    return [
        ("LoRA / PEFT (S7)", mib["deltaw"] / mib["peft"], 0.60),
        ("frozen floor / PEFT", mib["floor"] / mib["peft"], NONE),
        ("LoRA / full (S7)", mib["deltaw"] / mib["full"], 0.65),
        ("compact / full (S7)", mib["deltaw compact"] / mib["full"], 0.42),
        ("PEFT's, MiB", mib["peft"], NONE),
    ]


def table(rows: dict[str, Found]) -> str:
    """Markdown: a line per model, a column per comparison."""
    columns = [(found[0][0], min(target for _, _, target in found)) for found in zip(*rows.values(), strict=True)]
    lines = ["| model | " + " | ".join(what for what, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    if any(target != NONE for _, target in columns):
        lines.append(f"| *target* | {' | '.join('' if t == NONE else f'≤ {t:.2f}' for _, t in columns)} |")
    for name, found in rows.items():
        cells = (
            f"{v:.0f}" if what.endswith("MiB") else f"{v:.2f}{'' if v <= t else ' **missed**'}" for what, v, t in found
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(*names: str) -> None:
    """Every model, or those that are named; the page is written only from all."""
    linear: dict[str, Found] = {}
    convolutions: dict[str, Found] = {}
    space: dict[str, Found] = {}
    for name in names or WORKS:
        work = WORKS[name]()
        if name in CONVOLUTIONS:
            convolutions[work.name] = ratios_of_convolutions(work)
            print(table({work.name: convolutions[work.name]}), flush=True)
        else:
            linear[work.name] = ratios(work)
            space[work.name] = peaks(name)
            print(table({work.name: linear[work.name]}), table({work.name: space[work.name]}), sep="\n", flush=True)
    if not names:
        RESULT.write_text(
            "# The claims on other models\n\n"
            "A training step on models that nothing was tuned on (but the first, for which small layers are composed, and those with "
            f"convolutions): ratio of medians of {ROUNDS} rounds (more of short steps),\ntaken in turns, rank 8 on all linear "
            f"layers, weights random. Made by `python -m benchmarks.other_models`, seed {SEED}.\nS1's target is 1.08 times the frozen floor "
            f"where that is more.\n\n{table(linear)}\n\n"
            "Peak memory of a step above the loaded model, with dropout .05, each method in a process of its own. Where a language "
            "model's logits or DeBERTa's\nattention need most of it, no method that leaves the model as it is can be below the "
            f"frozen floor (no adapter at all, gradients through every block).\n\n{table(space)}\n\n"
            "All convolutions adapted, rank 8; no target was set. With LoRA a convolution is not much cheaper to train than in full: "
            f"its kernel has few numbers,\nand the passes over its output are what costs.\n\n{table(convolutions)}\n\n"
            f"{machine_of(machine())}.\n"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
