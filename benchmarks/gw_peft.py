"""The peer on the same GW data: PEFT's LoRA in a plain loop, same encoder, cut context, mels, head, order and schedule.

    python benchmarks/gw_peft.py --data gw-data --model FOLDER [--epochs 20] [--targets q_proj,k_proj,v_proj] [--out FILE]

Prints one JSON line per epoch and the whole at the end. The data, the base and the head's start are those of `deltaw train gw`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import peft
import torch

from deltaw.recipes.configure import build
from deltaw.training import memory
from deltaw.training.order import batches
from deltaw.training.schedule import factor
from deltaw.training.tasks.audio_classification import AudioClassification


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", default="gw-data")
    words.add_argument("--model", default="openai/whisper-small")
    words.add_argument("--epochs", type=int, default=20)
    words.add_argument("--targets", default="q_proj,k_proj,v_proj")
    words.add_argument("--rank", type=int, default=8)
    words.add_argument("--alpha", type=int, default=8)
    words.add_argument("--out")
    asked = words.parse_args()
    config = build({"recipe": "gw", "model": asked.model, "data": {"path": asked.data}, "epochs": asked.epochs})
    task = AudioClassification(config, speed=4.0)
    model = task.build()
    torch.manual_seed(config.seed)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=asked.rank, lora_alpha=asked.alpha, target_modules=asked.targets.split(","), modules_to_save=["head"]
        ),
    )
    rate = config.lr_for("lora")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=config.weight_decay, fused=True)
    before = memory.resident_bytes()
    history, seconds, step = [], 0.0, 0
    total = asked.epochs * math.ceil(len(task.splits["train"]) / config.batch_size)
    for epoch in range(asked.epochs):
        model.train()
        loss_sum = 0.0
        for chosen in batches(len(task.splits["train"]), config.batch_size, config.seed, epoch):
            started = time.perf_counter()
            batch = task.collate([task.example("train", i, None) for i in chosen])
            for group in optimizer.param_groups:
                group["lr"] = rate * factor(step, total, config.warmup, config.schedule)
            loss, _ = task.loss(model, batch)
            (loss / len(chosen)).backward()
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.item()
            seconds += time.perf_counter() - started
            step += 1
        history.append(
            {"epoch": epoch + 1, "seconds": round(seconds, 2), "train_loss": loss_sum / len(task.splits["train"])}
        )
        history[-1] |= validate(model, task, config.eval_batch_size)
        print(json.dumps(history[-1]), flush=True)
    found = {
        "method": f"PEFT {peft.__version__} LoRA",
        "targets": asked.targets,
        "trainable": sum(p.numel() for p in trained),
        "best_auc": max(row["auc"] for row in history),
        "best_loss": min(row["loss"] for row in history),
        "seconds": round(seconds, 2),
        "peak_above_model_bytes": memory.peak_bytes() - before,
        "threads": torch.get_num_threads(),
        "history": history,
    }
    print(json.dumps(found))
    if asked.out:
        Path(asked.out).write_text(json.dumps(found, indent=2) + "\n")


@torch.no_grad()
def validate(model: torch.nn.Module, task: AudioClassification, size: int) -> dict[str, float]:
    """Loss and scores over the validation part."""
    model.eval()
    tally, loss_sum, count = task.tally(), 0.0, len(task.splits["validation"])
    for start in range(0, count, size):
        batch = task.collate([task.example("validation", i, None) for i in range(start, min(start + size, count))])
        loss, logits = task.loss(model, batch)
        loss_sum += loss.item()
        tally.add(logits, batch)
    return {"loss": loss_sum / count, **tally.scores()}


if __name__ == "__main__":
    main()
