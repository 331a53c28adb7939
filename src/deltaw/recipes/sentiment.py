"""sentiment: is a film review's sentence favourable? MiniLM on Rotten Tomatoes (Pang and Lee 2005, arXiv:cs/0506075).

The hub ids are the default; where the same model and data are installed as packages, those are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig

if TYPE_CHECKING:
    from deltaw.training.task import Task

NAMES = {"0": "negative", "1": "positive", "neg": "negative", "pos": "positive"}


def task(config: RunConfig) -> Task:
    """The task with its data."""
    from deltaw.training.tasks.text_classification import TextClassification

    return TextClassification(config, NAMES)


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    from deltaw.training.tasks.text_classification import TextClassification

    return TextClassification(config, labels=facts["labels"], read="no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data, for the classes of a kept run."""
    from deltaw.training.tasks.text_classification import TextClassification

    return TextClassification(config, NAMES, labels=facts["labels"], read="whole" if other else "splits")


register(
    Recipe(
        name="sentiment",
        about="film reviews, favourable or not: MiniLM on 8,434 sentences of Rotten Tomatoes",
        task=task,
        kept=kept,
        scored=scored,
        defaults={
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "data": {
                "path": "cornell-movie-review-data/rotten_tomatoes",
                "split": "train",
                "validation": 0.08,
                "test": 0.12,
                "limit": 3000,
            },
            "epochs": 2,
            "evaluations": 2,
            "batch_size": 32,
            "lr": {"head": 3e-2, "full": 1e-4, "default": 1e-3},
            "base_dropout": 0.0,
        },
    )
)
