"""S6: the GW recipe until LoRA hears as well as full fine-tuning: training time of deltaw (int8 base), PEFT, and full.

    deltaw data gw --n 1000 --snr 8:20 --seed 0 --out gw-data
    python -m benchmarks.s6_gw --data gw-data --model whisper-tiny-en [--seeds 0,1,2] [--epochs 20] [--out FILE]

All three see the same mels, batches, head and schedule, in lock step: every batch is taken by each method in turn, so
that a machine that slows down slows all of them. PEFT's loop is the plain one that a user writes. The time that counts
is that of the training steps until the first epoch whose validation AUC is full's best less `MARGIN`.

The record is written after every epoch; seeds that it holds whole are not run again. Outside `make bench`: about an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import deltaw as dw
from benchmarks.lockstep import Curve, Runner
from benchmarks.measure import RESULTS, record, row
from deltaw.recipes.configure import build
from deltaw.training.config import RunConfig
from deltaw.training.order import batches
from deltaw.training.tasks.audio_classification import AudioClassification

MARGIN = 0.003
RANK, ALPHA = 8, 16
LR = 1.5e-3
"""Of LoRA, in both libraries: with the recipe's 5e-4 it is slower to rise. Full fine-tuning has the recipe's 2e-4."""
TARGETS = r"body\.encoder\.layers\..*(_proj|fc1|fc2)"


def full(model: nn.Module) -> nn.Module:
    """Every weight is trained."""
    return model.requires_grad_(True)


def peft_lora(model: nn.Module) -> nn.Module:
    """HF PEFT, as its documentation shows."""
    wrapped: nn.Module = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=["head"])
    )
    return wrapped


def deltaw_lora(model: nn.Module) -> nn.Module:
    """deltaw on an int8 base."""
    dw.attach(model, dw.LoRA(rank=RANK, alpha=ALPHA), TARGETS, train=["head"])
    dw.quantize(model, dw.Int8())
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {"full": full, "peft": peft_lora, "deltaw": deltaw_lora}


def one_seed(config: RunConfig, names: list[str], written: Callable[[dict[str, Curve]], None]) -> None:
    """All methods in lock step; `written` is told the curves after every epoch."""
    task = AudioClassification(config, speed=4.0)
    count = len(task.splits["train"])
    total = config.epochs * math.ceil(count / config.batch_size)
    runners = {}
    for name in names:
        model = task.build()
        torch.manual_seed(config.seed)
        rate = config.lr_for("full") if name == "full" else LR
        runners[name] = Runner(METHODS[name](model).train(), task, config, rate, total)
    for epoch in range(config.epochs):
        for turn, chosen in enumerate(batches(count, config.batch_size, config.seed, epoch)):
            for i in range(len(names)):
                runners[names[(i + turn) % len(names)]].step(chosen)
        for runner in runners.values():
            runner.validate()
        written({name: r.curve for name, r in runners.items()})
        last = "  ".join(f"{n} {r.curve[-1]['auc']:.4f} {r.curve[-1]['seconds']:.1f} s" for n, r in runners.items())
        print(f"seed {config.seed} epoch {epoch + 1}: {last}", flush=True)


def until(curve: Curve, auc: float) -> float | None:
    """Seconds of training until the first epoch that reaches `auc`, or None."""
    spent = 0.0
    for epoch in curve:
        spent += epoch["seconds"]
        if epoch["auc"] >= auc:
            return spent
    return None


def ratios(curves: dict[str, Curve], other: str) -> tuple[float, float, bool]:
    """deltaw / `other`: until the goal, and per epoch (medians); and whether `other` reached the goal.

    Of one that does not reach it in its whole run, that run's time counts, so that the ratio is an upper bound. Where
    deltaw does not, the ratio is infinite.
    """
    goal = max(epoch["auc"] for epoch in curves["full"]) - MARGIN
    ours, theirs = until(curves["deltaw"], goal), until(curves[other], goal)
    each = [statistics.median(epoch["seconds"] for epoch in curves[name]) for name in ("deltaw", other)]
    whole = sum(epoch["seconds"] for epoch in curves[other])
    return (math.inf if ours is None else ours / (theirs or whole)), each[0] / each[1], theirs is not None


def rows_of(seeds: dict[str, dict[str, Curve]], epochs: int) -> list[dict[str, Any]]:
    """The claim's rows from the seeds that are whole: medians over them."""
    whole = [c for c in seeds.values() if all(len(c.get(name, ())) == epochs for name in METHODS)]
    rows: list[dict[str, Any]] = []
    for other, target in (("peft", 0.5), ("full", 0.4)) if whole else ():
        found = [ratios(curves, other) for curves in whole]
        until_goal, epoch = (statistics.median(f[i] for f in found) for i in (0, 1))
        missed = sum(not reached for *_, reached in found)
        note = f" ({other} never in {missed} of them: its whole run counts)" if missed else ""
        never = sum(not math.isfinite(f[0]) for f in found)
        note += f" (deltaw never in {never})" if never else ""
        if math.isfinite(until_goal):
            each = [round(f[0], 3) if math.isfinite(f[0]) else None for f in found]  # None: deltaw never got there
            what = f"time to full's best AUC less {MARGIN}, {len(whole)} seeds{note}: deltaw / {other}"
            rows.append(row(what, {"ratio": until_goal}, target, each=each))
        rows.append(row(f"an epoch: deltaw / {other}", {"ratio": epoch}))
    return rows


def main(arguments: list[str] | None = None) -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", default="gw-data")
    words.add_argument("--model", default="openai/whisper-tiny.en")
    words.add_argument("--seeds", default="0,1,2")
    words.add_argument("--epochs", type=int, default=20)
    words.add_argument("--methods", default=",".join(METHODS))
    words.add_argument("--out", type=Path, default=RESULTS / "S6.json")
    asked = words.parse_args(arguments)
    names = asked.methods.split(",")
    seeds: dict[str, dict[str, Curve]] = {}
    if asked.out.is_file():
        before = json.loads(asked.out.read_text())
        if before["epochs"] == asked.epochs:
            seeds = before["seeds"]
            before["rows"] = rows_of(seeds, asked.epochs)
            asked.out.write_text(json.dumps(before, indent=1) + "\n")
    for seed in asked.seeds.split(","):
        if all(len(seeds.get(seed, {}).get(name, ())) == asked.epochs for name in names):
            continue
        config = build(
            {
                "recipe": "gw",
                "model": asked.model,
                "data": {"path": asked.data},
                "epochs": asked.epochs,
                "seed": int(seed),
            }
        )

        def written(curves: dict[str, Curve], seed: str = seed, config: RunConfig = config) -> None:
            seeds[seed] = curves
            settings = {
                "rank": RANK,
                "alpha": ALPHA,
                "targets": TARGETS,
                "lr": LR,
                "lr_full": config.lr_for("full"),
                "batch": config.batch_size,
            }
            rows = rows_of(seeds, asked.epochs)
            record("S6", rows, out=asked.out, epochs=asked.epochs, settings=settings, seeds=seeds)

        one_seed(config, names, written)


if __name__ == "__main__":
    main()
