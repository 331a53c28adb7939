"""Micro-batches of one epoch, from any batch onward, with or without worker processes: the same ones every time.

Workers cannot change what an example is: augmentation draws from a generator of (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from deltaw.training.order import generator, share
from deltaw.training.task import Batch, Task

ROWS = "prefix"
"""Key of a batch under which the recorded outputs of a frozen body travel."""


class Epoch(Dataset[Any]):
    """The examples of `split` as they are in `epoch`. With `recorded`, each brings its recorded outputs along."""

    def __init__(self, task: Task, split: str, seed: int, epoch: int, recorded: Sequence[Any] | None = None) -> None:
        self.task, self.split, self.seed, self.epoch, self.recorded = task, split, seed, epoch, recorded

    def __len__(self) -> int:
        return len(self.task.splits[self.split])

    def __getitem__(self, index: int) -> Any:
        random = generator("example", self.seed, self.epoch, index) if self.task.augments else None
        example = self.task.example(self.split, index, random)
        return (example, None if self.recorded is None else self.recorded[index])

    def collate(self, pairs: Sequence[tuple[Any, Any]]) -> Batch:
        """Examples -> batch."""
        batch = self.task.collate([example for example, _ in pairs])
        if self.recorded is not None:
            batch[ROWS] = [rows for _, rows in pairs]
        return batch


def micro_batches(
    epoch: Epoch, order: Sequence[Sequence[int]], size: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[list[tuple[Batch, bool]]]:
    """For each global batch of `order`: this rank's micro-batches of at most `size`, each with whether it counts.

    A rank that got nothing of a short batch still gets one example, which does not count, so that no rank waits.
    """
    plan = [share(batch, size, rank, world) for batch in order]
    flat = [own or [order[i][0]] for i, micros in enumerate(plan) for own in micros]
    private = torch.Generator().manual_seed(0)  # DataLoader would otherwise draw from the generator that dropout uses
    loader = iter(
        DataLoader(epoch, batch_sampler=flat, collate_fn=epoch.collate, num_workers=workers, generator=private)
    )  # type: ignore[arg-type]
    for micros in plan:
        yield [(next(loader), bool(own)) for own in micros]
