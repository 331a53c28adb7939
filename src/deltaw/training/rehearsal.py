"""--dry-run: what a run would train, need and take, and what its examples look like, without training or writing.

Batches of every kind are run: the largest, then those of an epoch in the run's own order, for a while, over a frozen
prefix where the run will have one (found and recorded as the run does it). Memory is the larger of two: what a step and an
evaluation batch hold at their peak, counted tensor by tensor; and, on a CPU, by how much this process grew, for an
allocator keeps more than is in use, and libraries keep something of each shape they have met (oneDNN its compiled
products), so that what the batches after the first added is counted up to all shapes of a run. The optimizer's state and
the weights that are put aside as the best so far are added. Time is that of the batches, counted up.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.model.peak import measured
from deltaw.model.summary import summary, training_peak
from deltaw.ops.compact import compact
from deltaw.training import memory
from deltaw.training.config import RunConfig
from deltaw.training.memory import MIB
from deltaw.training.methods import check_method, parameters, prepare, quantize_base
from deltaw.training.order import batches, generator, in_order
from deltaw.training.prefix import NotConstant
from deltaw.training.prefix_file import PrefixFile
from deltaw.training.prefix_run import frozen_body, recorded_rows, train_mode, whole_bytes
from deltaw.training.prefix_search import search
from deltaw.training.scoring import to_device
from deltaw.training.start_from_data import start_from_data
from deltaw.training.task import Task

SHOWN = 3
ENOUGH = 30.0
"""Seconds after which there are enough batches of one kind."""
PLAYED = 50
"""Batches at most whose frozen prefix is recorded: that takes its own time, before."""
MORE = 1.04
"""How much more a process has grown by the end of a run than over these batches, about (benchmarks/run_estimates.py)."""


def rehearse(make_task: Callable[[], Task], config: RunConfig) -> dict[str, Any]:
    """Build everything, measure a step and an evaluation batch, and say what the run would be.

    Returns JSON values: notes, parameters, memory in bytes (peak_bytes: above the loaded model), steps, seconds of
    training (from a recorded prefix, if the run will have one) and of evaluation (without), samples.
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
    _move(model)
    count, size = len(task.splits["train"]), config.batch_size * config.accumulate
    with tempfile.TemporaryDirectory() as folder:
        trained = _training(model, task, config, device, Path(folder)) if prepared.trains else Sample(0, 0.0, 0, 0)
    scored = [split for split in ("validation", "test") if split in task.splits] or ["train"]
    evaluations = [_evaluation(model, task, config, device, split) for split in scored]
    samples, (evaluated, rounds) = [trained, *(sample for sample, _ in evaluations)], evaluations[0]
    found = summary(model)
    grown = max(memory.peak_bytes(), *(s.highest for s in samples)) - loaded + sum(s.unseen for s in samples)
    grown = int(MORE * grown) + found.optimizer_bytes if device.type == "cpu" else 0
    kept = found.gradient_bytes if prepared.trains and config.keep == "best" else 0
    steps = math.ceil(count / size) * config.epochs if prepared.trains else 0
    passes = math.ceil(count / config.batch_size) * config.epochs if prepared.trains else 0
    times = config.epochs * config.evaluations if prepared.trains else 1
    at_the_end = sum(count * sample.seconds for sample, count in evaluations[1:])  # of the test part
    return {
        "notes": task.notes,
        "trainable": found.trainable,
        "total": plain,
        "share": found.trainable / plain,
        "weight_bytes": found.weight_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "peak_bytes": max(grown, *(s.peak for s in samples)) + kept,
        "steps": steps,
        "seconds": round(passes * trained.seconds, 1),
        "evaluation_seconds": round(times * rounds * evaluated.seconds + at_the_end, 1),
        "samples": [
            task.render(task.example("train", i, generator("example", config.seed, 0, i) if task.augments else None))
            for i in range(min(SHOWN, count))
        ],
    }


class Sample(NamedTuple):
    """What some batches of one kind took.

    peak: bytes above the model that the largest one holds. seconds: of one of them. highest: resident bytes of this process
    so far. unseen: bytes by which it will grow over the shapes that were not among these batches.
    """

    peak: int
    seconds: float
    highest: int
    unseen: int


def _training(model: nn.Module, task: Task, config: RunConfig, device: torch.device, folder: Path) -> Sample:
    """Training steps, without the optimizer's; from a recorded prefix, if the run will have one."""
    lengths, widths = task.lengths("train") if config.bucket else None, task.widths("train")
    order = batches(len(task.splits["train"]), config.batch_size, config.seed, 0, lengths)
    tried = _tried(order, widths)
    prefix = _prefix(model, task, config, device, folder, sorted({i for some in tried[:PLAYED] for i in some}))
    if prefix is not None:
        tried = tried[:PLAYED]
    playing = prefix or (lambda _: nullcontext())
    train_mode(model, frozen_body(model, task))

    def step(some: list[int]) -> None:
        with playing(some):
            _saving(model, config, _loss(model, task, config, some, device))().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    worked = _worked(step, tried, order, widths)
    with playing(tried[0]):
        peak = measured(model, _saving(model, config, _loss(model, task, config, tried[0], device)))
    return Sample(training_peak(model, peak), *worked)


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """Take every trained tensor off zero, as the first step does: until then the base's own kernels run (ops/linear.py)."""
    for parameter in model.parameters():
        if parameter.requires_grad and not bool(parameter.any()):
            parameter.fill_(1e-6)


def _prefix(
    model: nn.Module, task: Task, config: RunConfig, device: torch.device, folder: Path, some: list[int]
) -> Callable[[list[int]], AbstractContextManager[None]] | None:
    """The run's search for a frozen prefix, and its recording of `some` of the training examples: what plays these back.

    None where the run will have none.
    """
    if not config.cache_prefix or task.augments or all(p.requires_grad for p in model.parameters()):
        return None

    def answer(batch: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision != "no"):
            return task.loss(model, to_device(batch, device))

    file = PrefixFile(folder)
    try:
        prefix = search(model, task, answer, lambda: train_mode(model, frozen_body(model, task)), file)
        file.reserve(whole_bytes(prefix, task))
        model.eval()
        lengths = task.lengths("train") if config.bucket else None
        order = in_order(len(some), config.eval_batch_size, None if lengths is None else [lengths[i] for i in some])
        rows = recorded_rows(prefix, task, config, "train", [[some[i] for i in batch] for batch in order])
    except (NotConstant, OSError):
        file.close()
        return None
    return lambda chosen: prefix.playing([rows[i] for i in chosen])


@torch.no_grad()
def _evaluation(
    model: nn.Module, task: Task, config: RunConfig, device: torch.device, split: str
) -> tuple[Sample, int]:
    """Evaluation batches of a split, and how many there are. (A recorded prefix is recorded so, and then makes them fewer.)"""
    lengths = task.lengths(split) if config.bucket else None
    order = in_order(len(task.splits[split]), config.eval_batch_size, lengths)
    model.eval()

    def evaluate(some: list[int]) -> Tensor:
        batch = to_device(task.collate([task.example(split, i, None) for i in some]), device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision != "no"):
            return task.loss(model, dict(batch))[0]

    tried = _tried(order, task.widths(split))
    worked = _worked(evaluate, tried, order, task.widths(split))
    return Sample(training_peak(model, measured(model, lambda: evaluate(tried[0]))), *worked), len(order)


def _shape(some: list[int], widths: Sequence[int] | None) -> tuple[int, int]:
    """Examples and width of a batch."""
    return len(some), 1 if widths is None else max(widths[i] for i in some)


def _tried(order: Sequence[list[int]], widths: Sequence[int] | None) -> list[list[int]]:
    """The heaviest batch of `order`, whose peak counts, and after it the others as they come.

    How far an allocator's memory is torn depends on which sizes follow which: batches sorted by size, or one of each
    shape, grew a process a quarter less than the run.
    """
    heaviest = max(range(len(order)), key=lambda i: math.prod(_shape(order[i], widths)))
    return [order[heaviest], *order[:heaviest], *order[heaviest + 1 :]]


def _worked(
    work: Callable[[list[int]], object],
    tried: Sequence[list[int]],
    order: Sequence[list[int]],
    widths: Sequence[int] | None,
) -> tuple[float, int, int]:
    """`work` on the batches `tried`: the seconds of one of `order`, the highest resident size so far, and the bytes unseen.

    Time goes by the size; the first call, which prepares kernels, counts only where it is the only one.
    """
    shapes: list[tuple[int, int]] = []
    seconds: list[float] = []
    sizes: list[tuple[int, int]] = []
    before = memory.peak_bytes()
    memory.reset_peak()  # so that growth shows which stays below what was held before
    for some in tried:
        started = time.perf_counter()
        work(some)
        seconds.append(time.perf_counter() - started)
        shapes.append(_shape(some, widths))
        sizes.append((memory.peak_bytes(), memory.resident_bytes()))
        if sum(seconds) > ENOUGH:
            break
    met = len(set(shapes))
    # what stays of each shape shows in the peak, or, where the later batches are far smaller, in what is resident between them
    grown = max(after - first for first, after in zip(sizes[0], sizes[-1]))
    highest = memory.peak_bytes()
    unseen = grown / max(1, met - 1) * (len({_shape(some, widths) for some in order}) - met)
    counted = slice(1 if len(seconds) > 1 else 0, None)
    each = sum(seconds[counted]) / sum(map(math.prod, shapes[counted]))
    return each * statistics.mean(math.prod(_shape(some, widths)) for some in order), max(before, highest), int(unseen)


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
