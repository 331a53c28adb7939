"""What a run began with: marks of its base and of its examples, which a checkpoint keeps and a resumed run must have again.

They are samples, cheap to take: 16 values of every weight, and up to 32 examples of every split with their number.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError, DataError
from deltaw.io.known_weights import samples
from deltaw.io.tensor_file import content
from deltaw.training.task import Task

EXAMPLES = 32
BASE = "the base"

Beginning = dict[str, str]
"""What is marked -> its mark, a digest, behind the number of examples where it is a split's."""


def beginning(model: nn.Module, task: Task) -> Beginning:
    """The marks of a base as `task.build` gives it, before anything is attached, and of the task's examples."""
    stored = [t.detach() for t in (*model.parameters(), *model.buffers())]
    found = {BASE: hashlib.sha256(b"".join(samples(stored))).hexdigest()}
    for split, examples in task.splits.items():
        found[f"the data: {split}"] = f"{len(examples)} examples, {digest(task, split, len(examples))}"
    return found


def digest(task: Task, split: str, count: int) -> str:
    """Of some examples as batches of one, whatever a task makes them of."""
    made = hashlib.sha256()
    for index in np.linspace(0, count - 1, min(count, EXAMPLES)).astype(int) if count else ():
        random = np.random.default_rng(0) if task.augments else None
        try:
            batch = task.collate([task.example(split, int(index), random)])
        except DataError:  # unreadable: said where it is trained on
            continue
        for name, value in sorted(batch.items()):
            made.update(name.encode())
            if isinstance(value, Tensor):
                for piece in content(value.detach().to(torch.promote_types(value.dtype, torch.float32))):
                    made.update(piece)
    return made.hexdigest()


def check_same(before: Beginning, now: Beginning) -> None:
    """Refuse to go on from another beginning.

    Raises:
        ConfigError: the base or the data is not what it was.
    """
    for what in {**before, **now}:
        was, found = before.get(what, "nothing"), now.get(what, "nothing")
        if was != found:
            counts = "" if what == BASE else f" ({was.partition(',')[0]} then, {found.partition(',')[0]} now)"
            raise ConfigError(
                f"{what} is not what this run began with{counts}: put it back as it was, or start another run"
            )
