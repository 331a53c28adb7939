"""`Task`: what is learnt. Model, examples, loss and score in one object; the loop knows nothing else about a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.errors import NonFinite

Batch = dict[str, Any]


class Tally(ABC):
    """Collects outputs over a split and turns them into scores."""

    @abstractmethod
    def add(self, outputs: Tensor, batch: Batch) -> None:
        """Take in the outputs of one batch."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """Name -> value, over all that was added."""


class Task(ABC):
    """One learning problem.

    splits: "train", "validation" and maybe "test" -> examples, in an order that never changes.
    metric: the score that chooses the best epoch; higher_is_better says which way.
    model_name: what the base is called in files and tables.
    """

    splits: Mapping[str, Sequence[Any]]
    metric: str = "accuracy"
    higher_is_better: bool = True
    augments: bool = False
    """Whether `example` depends on the epoch."""
    model_name: str = "model"
    notes: list[str]
    """Facts about data and model that the log and the report state."""

    # ---- the model

    @abstractmethod
    def build(self) -> nn.Module:
        """The pretrained base; the same weights at every call, those of new modules included."""

    @abstractmethod
    def new_modules(self, model: nn.Module) -> list[str]:
        """Modules that the pretrained base lacks: trained in full whatever the method."""

    def check_fits(self, model: nn.Module) -> None:  # noqa: B027 (most tasks take whatever there is)
        """Refuse examples that `model`, which `build` has made, cannot take. ConfigError says what to set."""

    def drawn_modules(self) -> list[str]:
        """Those of the new modules that the last `build` filled at random: no other copy of the base has their values."""
        return []

    def prefix(self, model: nn.Module) -> str | None:
        """Path of the body: a module called once per forward, whose output is all that the head reads of the input."""
        return None

    def targets(self) -> str | list[str] | None:
        """Default targets of this task, or None for the configuration's."""
        return None

    @abstractmethod
    def keep_model(self, model: nn.Module, folder: Path) -> None:
        """Write the whole model into `folder`, readable without deltaw."""

    # ---- the examples

    def example(self, split: str, index: int, random: np.random.Generator | None) -> Any:
        """One example. Augmentation may draw from `random`, a function of (seed, epoch, index), and from nothing
        else; it is None for a task that does not augment."""
        return self.splits[split][index]

    def lengths(self, split: str) -> Sequence[int] | None:
        """The length of every example, where batches should hold similar ones."""
        return None

    def widths(self, split: str) -> Sequence[int] | None:
        """What each example needs of a batch's second dimension, where that differs."""
        return self.lengths(split)

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Examples -> tensors, batch first."""

    def render(self, example: Any) -> str:
        """One line that shows a person what the model will see of an example, and what it must answer."""
        return str(example)[:300]

    # ---- what is learnt

    def weight(self, batch: Batch) -> float:
        """How many terms the batch's loss sums up: examples, or tokens."""
        return float(len(next(iter(batch.values()))))

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the loss over the batch's terms, outputs)."""

    @abstractmethod
    def tally(self) -> Tally:
        """A fresh collector of scores."""

    # ---- after training

    def facts(self) -> dict[str, Any]:
        """JSON facts that travel with the adapter: kind of task, label map, sizes."""
        return {}

    def predict(self, model: nn.Module, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """Answers for raw inputs. Tasks that cannot say so."""
        raise NotImplementedError(f"{type(self).__name__} has no predict")


def answer(text: str, labels: Sequence[str], shares: Tensor) -> dict[str, Any]:
    """The answer for one input of a classification. shares: the probability of every class.

    Raises:
        NonFinite: they are none.
    """
    if not shares.isfinite().all():
        raise NonFinite(
            f"{text[:60]!r}: the model's answer is not finite: its base or what was trained holds too large numbers, "
            "NaN or infinity; train again with a lower lr"
        )
    return {
        "text": text,
        "label": labels[int(shares.argmax())],
        "probabilities": {name: float(p) for name, p in zip(labels, shares)},
    }


class Classified(Tally):
    """Accuracy, and for two classes the area under the ROC curve."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, outputs: Tensor, batch: Batch) -> None:
        self.logits.append(outputs.detach().float().cpu())
        self.labels.append(batch["labels"].cpu())

    def scores(self) -> dict[str, float]:
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        found = {"accuracy": (logits.argmax(-1) == labels).float().mean().item()}
        if self.classes == 2:
            found["auc"] = area_under_curve(logits[:, 1] - logits[:, 0], labels)
        return found


def area_under_curve(score: Tensor, label: Tensor) -> float:
    """Probability that a positive example scores above a negative one, ties counted half. `label` is 0 or 1.

    By ranks (Mann-Whitney U). NaN if one of the classes is absent, or a score is none.
    """
    positive = int(label.sum())
    negative = label.numel() - positive
    if positive == 0 or negative == 0 or bool(score.isnan().any()):
        return float("nan")
    score = score.double()
    ordered = score.sort().values
    below, up_to = torch.searchsorted(ordered, score), torch.searchsorted(ordered, score, right=True)
    ranks = (below + up_to + 1).double() / 2
    return float((ranks[label == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))
