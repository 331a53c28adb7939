"""--dry-run: what a run would train, need and take, and what its examples look like, without training or writing.

Memory is the larger of two: what a step and an evaluation batch hold at their peak, counted tensor by tensor; and, on a
CPU, by how much this process grew over the first batches, for an allocator keeps more than is in use. The optimizer's
state and the weights that are put aside as the best so far are added. Time is that of measured batches, counted up.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.model.peak import Peak, measured
from deltaw.model.summary import summary, training_peak
from deltaw.ops.compact import compact
from deltaw.training import memory
from deltaw.training.config import RunConfig
from deltaw.training.memory import MIB
from deltaw.training.methods import check_method, parameters, prepare, quantize_base
from deltaw.training.order import batches, generator, in_order
from deltaw.training.scoring import to_device
from deltaw.training.start_from_data import start_from_data
from deltaw.training.task import Batch, Task

SHOWN = 3
BATCHES, ENOUGH = 20, 20.0
"""Batches that are run, and the seconds after which there are enough of them."""
MORE = 1.08
"""How much more a process has grown by the end of a run than over these batches, about (benchmarks/run_estimates.py)."""


def rehearse(make_task: Callable[[], Task], config: RunConfig) -> dict[str, Any]:
    """Build everything, measure a step and an evaluation batch, and say what the run would be.

    Returns JSON values: notes, parameters, memory in bytes (peak_bytes: above the loaded model), steps, seconds of
    training and of evaluation (without a recorded prefix, which makes them fewer), samples.
    """
    check_method(config)
    task = make_task()
    model = task.build()
    plain = parameters(model)
    prepared = prepare(model, task, config)
    quantize_base(model, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    loaded = memory.loaded_bytes(model)
    if prepared.trains:
        start_from_data(model, task, config, device, task.notes.append)
    count, size = len(task.splits["train"]), config.batch_size * config.accumulate
    peak, step_seconds = _training(model, task, config, device) if prepared.trains else (0, 0.0)
    scored = [split for split in ("validation", "test") if split in task.splits] or ["train"]
    evaluations = [_evaluation(model, task, config, device, split) for split in scored]
    evaluated, (_, batch_seconds, rounds) = max(found[0] for found in evaluations), evaluations[0]
    found = summary(model)
    grown = MORE * (memory.peak_bytes() - loaded) + found.optimizer_bytes if device.type == "cpu" else 0
    kept = found.gradient_bytes if prepared.trains and config.keep == "best" else 0
    steps = math.ceil(count / size) * config.epochs if prepared.trains else 0
    passes = math.ceil(count / config.batch_size) * config.epochs if prepared.trains else 0
    times = config.epochs * config.evaluations if prepared.trains else 1
    return {
        "notes": task.notes,
        "trainable": found.trainable,
        "total": plain,
        "share": found.trainable / plain,
        "weight_bytes": found.weight_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "peak_bytes": int(max(peak, evaluated, grown)) + kept,
        "steps": steps,
        "seconds": round(passes * step_seconds, 1),
        "evaluation_seconds": round(times * rounds * batch_seconds, 1),
        "samples": [
            task.render(task.example("train", i, generator("example", config.seed, 0, i) if task.augments else None))
            for i in range(min(SHOWN, count))
        ],
    }


def _training(model: nn.Module, task: Task, config: RunConfig, device: torch.device) -> tuple[int, float]:
    """Peak above the model in bytes, of the largest batch; and the seconds of one of the first batches."""
    lengths = task.lengths("train") if config.bucket else None
    order = batches(len(task.splits["train"]), config.batch_size, config.seed, 0, lengths)
    widths = task.widths("train")
    heaviest = max(order, key=lambda some: len(some) * (1 if widths is None else max(widths[i] for i in some)))
    model.train()

    def step(some: list[int]) -> None:
        _saving(model, config, _loss(model, task, config, some, device))().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    seconds = _usual_seconds(step, order)  # first: the heaviest batch rarely meets an allocator that nobody has used
    peak = measured(model, _saving(model, config, _loss(model, task, config, heaviest, device)))
    return training_peak(model, peak), seconds


@torch.no_grad()
def _evaluation(
    model: nn.Module, task: Task, config: RunConfig, device: torch.device, split: str
) -> tuple[int, float, int]:
    """Peak above the model in bytes and seconds of one evaluation batch of a split, and the number of batches."""
    lengths = task.lengths(split) if config.bucket else None
    order = in_order(len(task.splits[split]), config.eval_batch_size, lengths)
    model.eval()

    def batch_of(indices: list[int]) -> Batch:
        return to_device(task.collate([task.example(split, i, None) for i in indices]), device)

    largest = batch_of(order[-1] if lengths is not None else order[0])

    def evaluate(batch: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision != "no"):
            return task.loss(model, dict(batch))[0]

    peak: Peak = measured(model, lambda: evaluate(largest))
    return training_peak(model, peak), _usual_seconds(lambda some: evaluate(batch_of(some)), order), len(order)


def _usual_seconds(work: Callable[[list[int]], object], order: Sequence[list[int]]) -> float:
    """Seconds of `work` on one of the batches, by the median of the first."""
    seconds: list[float] = []
    for some in order[:BATCHES]:
        started = time.perf_counter()
        work(some)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > ENOUGH:
            break
    return statistics.median(seconds)


def _loss(
    model: nn.Module, task: Task, config: RunConfig, chosen: list[int], device: torch.device
) -> Callable[[], Tensor]:
    examples = [task.example("train", i, generator("example", config.seed, 0, i)) for i in chosen]
    batch = to_device(task.collate(examples), device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision != "no"):
            return task.loss(model, dict(batch))[0]

    return loss


def _saving(model: nn.Module, config: RunConfig, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`loss` as a training step calls it."""

    def inner() -> Tensor:
        with compact(model):
            return loss()

    return inner if config.compact else loss


def text(facts: dict[str, Any]) -> str:
    """The rehearsal for people."""
    above = facts["weight_bytes"] + facts["peak_bytes"]
    lines = [
        *facts["notes"],
        f"trainable: {facts['trainable']:,} parameters ({facts['share']:.2%} of the {facts['total']:,} of the plain model)",
        f"memory: weights {facts['weight_bytes'] / MIB:,.1f} MiB, gradients {facts['gradient_bytes'] / MIB:,.1f} MiB, Adam "
        f"{facts['optimizer_bytes'] / MIB:,.1f} MiB; at its peak about {facts['peak_bytes'] / MIB:,.0f} MiB above the "
        f"loaded model, {above / MIB:,.0f} with it (data and program not counted)",
        f"time: {facts['steps']:,} steps, about {_duration(facts['seconds'])} of training and "
        f"{_duration(facts['evaluation_seconds'])} of evaluation, as one batch of each took here",
        "first examples:",
        *(f"  {sample}" for sample in facts["samples"]),
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
