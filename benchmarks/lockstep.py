"""Whole trainings of several methods in one process, batch by batch in turn: a machine that slows down slows all of them.

The loop is the plain one that a user writes: schedule, loss, backward, clip, step. Only that is timed, not validation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.measure import CLOCK
from deltaw.training.config import RunConfig
from deltaw.training.schedule import factor
from deltaw.training.task import Task

Curve = list[dict[str, float]]
"""One row per epoch: seconds (of the training steps since the last row), train_loss (their sum, per example), loss, and the task's scores."""


@dataclass
class Runner:
    """One method's model on its way through the epochs. seconds: of the current epoch's steps."""

    model: nn.Module
    task: Task
    config: RunConfig
    rate: float
    total: int
    step_number: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    curve: Curve = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        decay = self.config.weight_decay
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.rate, weight_decay=decay, fused=True)

    def step(self, chosen: list[int]) -> None:
        """One batch, timed."""
        start = CLOCK()
        batch = self.task.collate([self.task.example("train", i, None) for i in chosen])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor(self.step_number, self.total, self.config.warmup, self.config.schedule)
        loss, _ = self.task.loss(self.model, batch)
        (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.item()
        self.seconds += CLOCK() - start
        self.step_number += 1
        assert float(norm) > 0, "no gradient"

    @torch.no_grad()
    def validate(self, split: str = "validation") -> None:
        """The epoch's row."""
        self.model.eval()
        tally, loss_sum, count = self.task.tally(), 0.0, len(self.task.splits[split])
        size = self.config.eval_batch_size
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            batch = self.task.collate([self.task.example(split, i, None) for i in rows])
            loss, logits = self.task.loss(self.model, batch)
            loss_sum += loss.item()
            tally.add(logits, batch)
        found: dict[str, Any] = {
            "epoch": len(self.curve) + 1,
            "seconds": round(self.seconds, 3),
            "train_loss": round(self.loss_sum / len(self.task.splits["train"]), 6),
            "loss": round(loss_sum / count, 6),
            **{name: round(score, 6) for name, score in tally.scores().items()},
        }
        self.curve.append(found)
        self.seconds = self.loss_sum = 0.0
        self.model.train()
