"""The frozen prefix of a run: found, recorded once for each example of each split, or, with the reason said, left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaw.training.config import RunConfig
from deltaw.training.loader import ROWS, Epoch, micro_batches
from deltaw.training.memory import MIB
from deltaw.training.order import in_order
from deltaw.training.prefix import NotConstant, Prefix, Row
from deltaw.training.prefix_file import LARGEST, PrefixFile
from deltaw.training.prefix_search import search
from deltaw.training.task import Task


def frozen_prefix(
    model: nn.Module,
    task: Task,
    config: RunConfig,
    folder: Path,
    answer: Callable[[Any], tuple[Tensor, Tensor]],
    train_mode: Callable[[], object],
    say: Callable[[str], object],
) -> tuple[Prefix, dict[str, list[Row]], float] | None:
    """Find and record the frozen prefix of `model`; None, with the reason said, where there is none.

    answer: batch -> (loss, outputs), the whole model. train_mode: puts the model into the mode that it is trained in.
    folder: of the run; the file lies there without a name, so that nothing is left however the process ends.

    Returns (prefix, split -> one row per example, seconds that the training split took).
    """
    if not config.cache_prefix or all(p.requires_grad for p in model.parameters()):
        return None
    if task.augments:
        say("the frozen prefix is computed in every epoch: examples are augmented")
        return None
    file = PrefixFile(folder)
    try:
        prefix = search(model, task, answer, train_mode, file)
        found: dict[str, list[Row]] = {}
        needed = whole_bytes(prefix, task)
        file.reserve(needed)
        model.eval()
        seconds = 0.0
        for split in task.splits:
            started = time.perf_counter()
            lengths = task.lengths(split) if config.bucket else None
            rows = recorded_rows(
                prefix, task, config, split, in_order(len(task.splits[split]), config.eval_batch_size, lengths)
            )
            found[split] = [rows[i] for i in range(len(rows))]
            if split == "train":
                seconds = time.perf_counter() - started
    except (NotConstant, OSError) as error:
        file.close()
        say(f"the frozen prefix is computed in every epoch: {error}")
        return None
    count = sum(map(len, found.values()))
    last = prefix.cuts[-1].name
    say(
        f"everything up to {last} is frozen and was computed once for each of {count:,} examples "
        f"({needed / MIB:,.1f} MiB on disk, at most {LARGEST / MIB:,.0f})"
    )
    return prefix, found, seconds


def recorded_rows(
    prefix: Prefix, task: Task, config: RunConfig, split: str, order: Sequence[Sequence[int]]
) -> dict[int, Row]:
    """The rows of those examples of `split` that are in the batches `order`."""
    widths = task.widths(split)
    rows: dict[int, Row] = {}
    for indices, micros in zip(order, micro_batches(Epoch(task, split, config.seed, 0), order, config.eval_batch_size)):
        for batch, _ in micros:
            batch.pop(ROWS, None)
            own = prefix.record(batch, None if widths is None else [widths[i] for i in indices])
            rows.update(zip(indices, own, strict=True))
    return rows


def whole_bytes(prefix: Prefix, task: Task) -> int:
    """What the rows of all splits take in the file."""
    return sum(
        prefix.row_bytes(n) for split, part in task.splits.items() for n in task.widths(split) or [0] * len(part)
    )


def train_mode(model: nn.Module, body: nn.Module | None) -> None:
    """Training mode, but for a `frozen_body`."""
    model.train()
    if body is not None:
        body.eval()


def frozen_body(model: nn.Module, task: Task) -> nn.Module | None:
    """The part of `model` below its head, if nothing in it is trained: it stays in evaluation mode while the rest trains."""
    path = task.prefix(model)
    body = None if path is None else model.get_submodule(path)
    return None if body is None or any(p.requires_grad for p in body.parameters()) else body
