"""Loss and scores of a model over a split: in training, for a kept result, and in a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import NonFinite
from deltaw.training.config import RunConfig
from deltaw.training.loader import Epoch, micro_batches
from deltaw.training.order import in_order
from deltaw.training.task import Batch, Task


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    config: RunConfig,
    split: str,
    answer: Callable[[Batch], tuple[Tensor, Tensor]] | None = None,
    recorded: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Loss and scores of `model` over a split. `answer`: how a batch is computed, if not plainly by the task."""
    model.eval()
    device = next(model.parameters()).device
    order = in_order(len(task.splits[split]), config.eval_batch_size, task.lengths(split) if config.bucket else None)
    tally, loss_sum, weight = task.tally(), 0.0, 0.0
    for micros in micro_batches(Epoch(task, split, config.seed, 0, recorded), order, config.eval_batch_size):
        for batch, _ in micros:
            weight += task.weight(batch)
            loss, outputs = task.loss(model, to_device(batch, device)) if answer is None else answer(batch)
            loss_sum += loss.item()
            tally.add(outputs, batch)
    return {"loss": loss_sum / weight, **tally.scores()}


def check_finite(scores: Mapping[str, float], split: str) -> None:
    """Refuse scores whose loss is not finite: every other number among them may look fine.

    Raises:
        NonFinite: it is not.
    """
    if not math.isfinite(scores["loss"]):
        raise NonFinite(
            f"the {split} loss is {scores['loss']}, an answer of the model is not finite: lower lr in training, "
            f"or look at the base and the {split} data"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch on `device`."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
