"""Seed 001's table of trained parameters, recounted on whisper-small's shape (meta device: no weights are needed).

    python benchmarks/gw_parameters.py

The seed prints 89 M (full), 2.32 M (frozen encoder: the head alone) and 3.4 M (LoRA, r = 8) and shows neither its head nor
its flags' values. So the head is taken as 2.32 M, and every set of adapted projections is counted that fits the third.
"""

from __future__ import annotations

import json
from itertools import combinations

import torch

import deltaw as dw
from deltaw.training.listener import Listener
from deltaw.training.whisper import empty_encoder

SMALL = {
    "num_mel_bins": 80,
    "d_model": 768,
    "encoder_layers": 12,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "max_source_positions": 1500,
}
"""openai/whisper-small's encoder."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SEED = {"full": 89e6, "head": 2.32e6, "lora": 3.4e6}


def encoder_parameters() -> dict[str, int]:
    """Parameters of the encoder: as transformers counts, and as openai-whisper does (positions are a buffer there)."""
    with torch.device("meta"):
        encoder = empty_encoder(SMALL)
    every = sum(p.numel() for p in encoder.parameters())
    positions = encoder.get_submodule("embed_positions").weight.numel()
    return {"transformers": every, "openai-whisper": every - positions}


def adapted(targets: tuple[str, ...], rank: int = 8) -> int:
    """Trained parameters of rank-`rank` LoRA on these projections of every encoder layer."""
    with torch.device("meta"):
        encoder = empty_encoder(SMALL)
    dw.attach(encoder, dw.LoRA(rank=rank, alpha=rank), targets=list(targets))
    return sum(p.numel() for p in encoder.parameters() if p.requires_grad)


def fitting() -> dict[str, int]:
    """Sets of projections -> trained parameters with the seed's head, where that is 3.4 M to two digits."""
    found = {}
    each = {name: adapted((name,)) for name in PROJECTIONS}
    for count in range(1, len(PROJECTIONS) + 1):
        for chosen in combinations(PROJECTIONS, count):
            total = round(SEED["head"]) + sum(each[name] for name in chosen)
            if abs(total - SEED["lora"]) < 0.05e6:
                found["+".join(chosen)] = total
    return found


def ours() -> dict[str, int]:
    """What the recipe `gw` trains on whisper-small with three detectors: head, q,k,v, all linears, everything."""
    with torch.device("meta"):
        model = Listener(empty_encoder(SMALL), 3, 768, 256, 2)
    head = sum(p.numel() for p in model.head.parameters())
    every = sum(p.numel() for p in model.parameters())
    return {
        "full": every,
        "head": head,
        "lora on q,k,v": head + adapted(PROJECTIONS[:3]),
        "lora on all linears": head + adapted(PROJECTIONS),
    }


if __name__ == "__main__":
    encoder = encoder_parameters()
    print(
        json.dumps(
            {
                "encoder": encoder,
                "full, with a head of 2.32 M": {k: v + round(SEED["head"]) for k, v in encoder.items()},
                "q,k,v with a head of 2.32 M": round(SEED["head"]) + adapted(PROJECTIONS[:3]),
                "targets that give 3.4 M": fitting(),
                "recipe gw": ours(),
            },
            indent=2,
        )
    )
