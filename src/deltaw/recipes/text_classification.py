"""text-classification: your own labelled sentences, with any encoder of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig

if TYPE_CHECKING:
    from deltaw.training.task import Task


def task(config: RunConfig) -> Task:
    """The task with its data."""
    from deltaw.training.tasks.text_classification import TextClassification

    return TextClassification(config)


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    from deltaw.training.tasks.text_classification import TextClassification

    return TextClassification(config, labels=facts["labels"], read="no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data, for the classes of a kept run."""
    from deltaw.training.tasks.text_classification import TextClassification

    return TextClassification(config, labels=facts["labels"], read="whole" if other else "splits")


register(
    Recipe(
        name="text-classification",
        about="your own labelled texts (data=FILE, FOLDER or hub id) with any encoder (model=)",
        task=task,
        kept=kept,
        scored=scored,
        defaults={
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "lr": {"head": 3e-3, "full": 5e-5, "default": 5e-4},
        },
    )
)
