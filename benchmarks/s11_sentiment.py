"""S11: the recipe `sentiment` as a whole: training time of deltaw (int8 base), PEFT in a plain loop, and full fine-tuning.

MiniLM on 3,000 sentences of film reviews, 2 epochs, batches of 32, rank 8 on all linear layers, dropout .05. The others'
loop is the plain one: sentences in random order, padded to the longest of the batch. deltaw's differs in two things:
the frozen weights are in 8 bit, and sentences of similar length share a batch. Same data, rate, schedule, head, seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import deltaw as dw
from benchmarks.lockstep import Runner
from benchmarks.measure import SEED, record, row
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.order import batches

RANK, ALPHA, DROPOUT = 8, 16, 0.05
NOISE = 0.03
"""Two standard errors of a difference of two accuracies on the test part's 1,024 sentences."""


def full(model: nn.Module) -> nn.Module:
    """Every weight is trained."""
    return model.requires_grad_(True)


def peft_lora(model: nn.Module) -> nn.Module:
    """HF PEFT, as its documentation shows; it trains the classifier of its own accord."""
    options = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
    wrapped: nn.Module = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", **options))
    return wrapped


def deltaw_lora(model: nn.Module) -> nn.Module:
    """deltaw on an int8 base."""
    dw.attach(model, dw.LoRA(rank=RANK, alpha=ALPHA, dropout=DROPOUT), train=["classifier"])
    dw.quantize(model, dw.Int8())
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {"deltaw": deltaw_lora, "peft": peft_lora, "full": full}


def main() -> None:
    config = build({"recipe": "sentiment", "seed": SEED})
    task = recipes["sentiment"].task(config)
    count = len(task.splits["train"])
    total = config.epochs * math.ceil(count / config.batch_size)
    runners = {}
    for name, prepare in METHODS.items():
        model = task.build()
        torch.manual_seed(SEED)
        rate = config.lr_for("full" if name == "full" else "lora")
        runners[name] = Runner(prepare(model).train(), task, config, rate, total)
    trained = {name: sum(p.numel() for p in r.trained) for name, r in runners.items()}
    assert trained["deltaw"] == trained["peft"] < trained["full"], trained
    names = list(METHODS)
    for epoch in range(config.epochs):
        plain = batches(count, config.batch_size, SEED, epoch)
        order = dict.fromkeys(names, plain)
        order["deltaw"] = batches(count, config.batch_size, SEED, epoch, task.lengths("train"))
        for turn in range(len(plain)):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                runners[name].step(order[name][turn])
    for runner in runners.values():
        runner.validate("test")
    spent = {name: sum(epoch["seconds"] for epoch in r.curve) for name, r in runners.items()}
    accuracy = {name: r.curve[-1]["accuracy"] for name, r in runners.items()}
    assert accuracy["deltaw"] >= accuracy["peft"] - NOISE, f"not the same accuracy: {accuracy}"
    rows = [
        row("sentiment, 2 epochs, int8 .05: deltaw / PEFT", {"ratio": spent["deltaw"] / spent["peft"]}, 0.42),
        row("sentiment, 2 epochs, int8 .05: deltaw / full", {"ratio": spent["deltaw"] / spent["full"]}, 0.52),
        row("sentiment, 2 epochs: PEFT / full", {"ratio": spent["peft"] / spent["full"]}),
    ]
    record("S11", rows, seconds=spent, test_accuracy=accuracy, curves={n: r.curve for n, r in runners.items()})


if __name__ == "__main__":
    main()
