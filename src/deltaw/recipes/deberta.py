"""deberta: seed 002's setting. DeBERTa-v3 built from its configuration, LoRA on query and value, the classifier in full.

The seed's adapters: rank 8, alpha 16 as the plain factor, A drawn from N(0, 1/rank), dropout .05 on the output. With
deberta.size=large the counts are the seed's: 435,063,810 parameters, 788,482 trained. The base knows nothing yet, so this
shows that training runs, not what a pretrained DeBERTa can do: for that, model=microsoft/deberta-v3-large (or a folder).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from deltaw.recipes.recipe import Recipe, register
from deltaw.recipes.sentiment import NAMES
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.task import Task


class Options(Section):
    """The section `deberta`."""

    size: Literal["tiny", "small", "base", "large"] = Field(
        "tiny", description="which configuration, where model= gives no weights; large is the seed's"
    )
    tokenizer: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="whose tokenizer cuts the texts for it"
    )


def task(config: RunConfig) -> Task:
    """The task with its data."""
    return _task(config, None, "splits")


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    return _task(config, facts, "no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data, for the classes of a kept run."""
    return _task(config, facts, "whole" if other else "splits")


def _task(config: RunConfig, facts: Mapping[str, Any] | None, read: Literal["splits", "whole", "no"]) -> Task:
    from deltaw.training.tasks.deberta import DebertaFromConfig
    from deltaw.training.tasks.text_classification import TextClassification

    labels = None if facts is None else facts["labels"]
    size, tokenizer = config.options["size"], config.options["tokenizer"]
    if facts is not None and "size" in facts:
        size, tokenizer = facts["size"], facts["tokenizer"]
        if config.model is not None and config.model.startswith("deberta-v3-"):  # as the adapter records its base
            config = config.model_copy(update={"model": None})
        config = config.model_copy(update={"seed": facts["seed"]})
    if config.model is not None:
        return TextClassification(config, NAMES, labels=labels, read=read)
    return DebertaFromConfig(config, size, tokenizer, NAMES, labels, read)


register(
    Recipe(
        name="deberta",
        about="DeBERTa-v3 from its configuration on sentences (seed 002; deberta.size=large has the seed's counts)",
        task=task,
        kept=kept,
        scored=scored,
        options=Options,
        defaults={
            "data": {
                "path": "cornell-movie-review-data/rotten_tomatoes",
                "split": "train",
                "validation": 0.08,
                "test": 0.12,
                "limit": 3000,
            },
            "targets": ["query_proj", "value_proj"],
            "lora": {
                "rank": 8,
                "alpha": 16,
                "scaling": "alpha",
                "init": "gaussian/sqrt(rank)",
                "dropout": 0.05,
                "dropout_at": "output",
            },
            "max_length": 64,
            "epochs": 2,
            "batch_size": 32,
            "lr": {"full": 3e-4, "default": 1e-3},
        },
    )
)
