"""R11: NaN, infinity and out-of-memory at random steps of random runs; every one must end as promised.

    python -m tests.crash.faults --trials 100 --seed 0

Promised: a loss or gradient that is not finite stops the run with exit code 4, checkpoints from before stay, nothing is
published, and resuming without the fault ends in the bits of a calm run. Out of memory halves the micro-batch; the run
ends with the same steps as a calm one, its losses equal up to rounding. No memory for a single example is exit code 5.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deltaw.errors import NonFinite, OutOfMemory
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.checkpoint import newest
from deltaw.training.run import train
from tests.tiny_text import make_data, make_model

KINDS = ("nan loss", "infinite loss", "nan gradient", "memory in forward", "memory in backward", "memory for one")
BATCH, STEPS, EVERY = 8, 16, 3


class Faulty:
    """A task whose loss misbehaves in training step `step` (counted from 0), at its `micro`-th micro-batch."""

    def __init__(self, task: Any, disturb: Callable[[int, Any, Any], Any]) -> None:
        self.task, self.disturb, self.calls = task, disturb, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, model: Any, batch: Any) -> Any:
        loss, outputs = self.task.loss(model, batch)
        if model.training and torch.is_grad_enabled():
            self.calls += 1
            loss = self.disturb(self.calls - 1, loss, batch)
        return loss, outputs


class BadGradient(torch.autograd.Function):
    """The loss itself, with a gradient of NaN (or an exception) behind it."""

    @staticmethod
    def forward(ctx: Any, loss: Any, what: Any) -> Any:
        ctx.what = what
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if isinstance(ctx.what, Exception):
            raise ctx.what
        return gradient * ctx.what, None


def disturbance(kind: str, step: int, micros: int, limit: int) -> Callable[[int, Any, Any], Any]:
    """What the fault does to the loss. `limit`: examples that memory has room for."""
    hit = step * micros + micros // 2
    full = torch.OutOfMemoryError("made up")

    def disturb(call: int, loss: Any, batch: Any) -> Any:
        if kind.startswith("memory"):
            if len(batch["labels"]) > limit and call >= step * micros:
                if kind == "memory in backward":
                    return BadGradient.apply(loss, full)
                raise full
            return loss
        if call != hit:
            return loss
        if kind == "nan gradient":
            return BadGradient.apply(loss, float("nan"))
        return loss * (float("nan") if kind == "nan loss" else float("inf"))

    return disturb


def trial(chance: random.Random, root: Path, calm: Callable[[int, int], tuple[Any, Path]], number: int) -> str | None:
    """One fault; None, or what was not as promised."""
    kind = chance.choice(KINDS)
    seed, accumulate, step = chance.randint(0, 3), chance.choice((1, 2)), chance.randint(0, STEPS - 1)
    limit = 0 if kind == "memory for one" else chance.choice((1, 2, 3))
    config = configured(root, seed, accumulate, dropout=not kind.startswith("memory"))
    expected, calm_folder = calm(seed, accumulate if not kind.startswith("memory") else -accumulate)
    folder = root / f"trial-{number}"
    what = f"{kind} at step {step}, seed {seed}, accumulate {accumulate}, room for {limit}"

    def run(resume: bool, disturb: Callable[[int, Any, Any], Any] | None) -> Any:
        def make() -> Any:
            task = recipes["text-classification"].task(config)
            return task if disturb is None else Faulty(task, disturb)

        return train(make, config, folder, resume=resume, quiet=True)

    disturb = disturbance(kind, step, accumulate, limit)
    saved = step // EVERY * EVERY
    try:
        found = run(False, disturb)
    except (NonFinite, OutOfMemory) as error:
        code = 5 if kind == "memory for one" else 4
        if kind in ("memory in forward", "memory in backward") or error.exit_code != code:
            return f"{what}: ended with {type(error).__name__}: {error}"
        if kind != "memory for one" and f"step {step + 1}:" not in str(error):
            return f"{what}: the message names another step: {error}"
        if (folder / "adapter_model.safetensors").exists():
            return f"{what}: an adapter was published"
        kept, _, skipped = newest(folder / "checkpoints")
        if skipped or (kept is None) != (saved == 0) or (kept is not None and kept.state["step"] != saved):
            return f"{what}: the checkpoint of step {saved} is not the newest ({skipped})"
        run(folder.exists(), None)
        one, other = (load_file(f / "adapter_model.safetensors") for f in (folder, calm_folder))
        if kind == "memory for one":
            return None if all(torch.allclose(one[k], other[k], atol=1e-3) for k in other) else f"{what}: another end"
        return None if all(torch.equal(one[k], other[k]) for k in other) else f"{what}: resumed to other bits"
    if not kind.startswith("memory") or kind == "memory for one":
        return f"{what}: nobody noticed"
    for mine, theirs in zip(found["history"], expected["history"], strict=True):
        if mine["step"] != theirs["step"] or abs(mine["train_loss"] - theirs["train_loss"]) > 1e-4:
            return f"{what}: {mine} instead of {theirs}"
    return None


def configured(root: Path, seed: int, accumulate: int, *, dropout: bool) -> Any:
    """A small run of STEPS steps; without dropout, how examples are spread over micro-batches changes nothing."""
    given = {
        "recipe": "text-classification", "model": str(root / "model"), "data": str(root / "data.csv"), "epochs": 2,
        "batch_size": BATCH // accumulate, "accumulate": accumulate, "seed": seed, "checkpoint_every": EVERY,
        "keep": "last", "lr": 5e-3, "cache_prefix": False, "lora": {"dropout": 0.1 * dropout},
    }  # fmt: skip
    return build(given if dropout else {**given, "base_dropout": 0.0})


def trials(count: int, seed: int) -> dict[str, Any]:
    """Run `count` faults; how many ended as promised, and what did not."""
    chance = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="deltaw-faults-"))
    known: dict[tuple[int, int], tuple[Any, Path]] = {}

    def calm(run_seed: int, accumulate: int) -> tuple[Any, Path]:
        key = (run_seed, accumulate)
        if key not in known:
            folder = root / f"calm-{run_seed}-{accumulate}"
            config = configured(root, run_seed, abs(accumulate), dropout=accumulate > 0)
            results = train(lambda: recipes["text-classification"].task(config), config, folder, quiet=True)
            known[key] = (results, folder)
        return known[key]

    wrong = []
    try:
        make_model(root / "model")
        make_data(root / "data.csv", 80)
        for number in range(count):
            problem = trial(chance, root, calm, number)
            if problem is not None:
                wrong.append(problem)
            shutil.rmtree(root / f"trial-{number}", ignore_errors=True)
            print(json.dumps({"trials": number + 1, "wrong": len(wrong)}), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return {"trials": count, "as promised": count - len(wrong), "seed": seed, "wrong": wrong}


def main() -> int:
    """Run the trials of the command line; 0 if all ended as promised."""
    options = argparse.ArgumentParser()
    options.add_argument("--trials", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    found = trials(given.trials, given.seed)
    print(json.dumps(found, indent=2))
    return 0 if not found["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
