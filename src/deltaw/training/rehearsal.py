"""--dry-run: what a run would train, need and take, and what its examples look like, without training or writing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from deltaw.model.summary import summary
from deltaw.training import memory
from deltaw.training.config import RunConfig
from deltaw.training.fit import to_device
from deltaw.training.methods import check_method, prepare
from deltaw.training.order import batches, generator
from deltaw.training.task import Task

SHOWN = 3


def rehearse(make_task: Callable[[], Task], config: RunConfig) -> dict[str, Any]:
    """Build everything, time one batch forward and backward, and say what the run would be.

    Returns JSON values: notes, parameters, memory in bytes, steps, seconds (an estimate from one batch, evaluation not
    counted), samples.
    """
    check_method(config)
    task = make_task()
    model = task.build()
    prepared = prepare(model, task, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    count = len(task.splits["train"])
    size = config.batch_size * config.accumulate
    order = batches(count, config.batch_size, config.seed, 0, task.lengths("train") if config.bucket else None)
    chosen = order[len(order) // 2]
    examples = [task.example("train", i, generator("example", config.seed, 0, i)) for i in chosen]
    batch = to_device(task.collate(examples), device)
    seconds = []
    for _ in range(2 if prepared.trains else 0):  # the first pass warms up
        started = time.perf_counter()
        loss, _outputs = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    found = summary(model)
    steps = math.ceil(count / size) * config.epochs if prepared.trains else 0
    passes = math.ceil(count / config.batch_size) * config.epochs
    return {
        "notes": task.notes,
        "trainable": found.trainable,
        "total": found.total,
        "share": found.share,
        "weight_bytes": found.weight_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "peak_bytes_of_one_pass": memory.peak_bytes(),
        "steps": steps,
        "seconds": round(passes * seconds[-1], 1) if seconds else 0.0,
        "samples": [task.render(task.splits["train"][i]) for i in range(min(SHOWN, count))],
    }


def text(facts: dict[str, Any]) -> str:
    """The rehearsal for people."""
    mib = memory.MIB
    lines = [
        *facts["notes"],
        f"trainable: {facts['trainable']:,} of {facts['total']:,} parameters ({facts['share']:.2%})",
        f"memory: weights {facts['weight_bytes'] / mib:,.1f} MiB, gradients {facts['gradient_bytes'] / mib:,.1f} MiB, Adam "
        f"{facts['optimizer_bytes'] / mib:,.1f} MiB; the process with one batch {facts['peak_bytes_of_one_pass'] / mib:,.0f} MiB",
        f"time: {facts['steps']:,} steps, about {facts['seconds']:,.0f} s of training",
        "first examples:",
        *(f"  {sample}" for sample in facts["samples"]),
    ]
    return "\n".join(lines)
