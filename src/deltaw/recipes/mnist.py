"""mnist: seed 000's experiment. A perceptron 784-128-256-10, pretrained, then LoRA on all three layers against full training.

The adapters are the seed's: rank 4, alpha 8 as the plain factor, A drawn from N(0, 1/rank). Pretraining and training:
Adam, learning rate 0.005, batches of 64, 10 epochs, the last epoch's weights (github.com/rasbt/dora-from-scratch).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltaw.errors import ConfigError, DataError
from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.pictures import Pictures
    from deltaw.training.task import Task


class Options(Section):
    """The section `mnist`."""

    source: str | None = Field(
        None,
        description="npz, folder of IDX files, or hub id (data= says the same); left out: scikit-learn's 8x8 digits",
    )
    hidden: list[int] = Field(default_factory=lambda: [128, 256], description="sizes of the hidden layers")
    pretrain_epochs: int = Field(10, gt=0, description="epochs of the pretraining, where model= gives no base")
    scratch: bool = Field(False, description="train the network from nothing (how the base is made)")


def task(config: RunConfig) -> Task:
    """The task with its data."""
    import numpy as np

    from deltaw.training.pictures import read_pictures, split
    from deltaw.training.small_networks import perceptron
    from deltaw.training.tasks.image_classification import ImageClassification

    options = Options.model_validate(config.options)
    if options.source and config.data.path and options.source != config.data.path:
        raise ConfigError(f"mnist.source={options.source} and data={config.data.path} both name the data: give one")
    found, where = read_pictures(config.data.path or options.source)
    parts = split(found, config.data.validation, config.data.test, config.seed)
    parts["train"] = parts["train"][slice(config.data.limit)]
    height, width = parts["train"].images.shape[1:]
    classes = int(max(np.max(p.labels) for p in parts.values())) + 1
    made = ImageClassification(
        config,
        lambda: perceptron(height * width, options.hidden, classes),
        parts,
        [str(i) for i in range(classes)],
        f"perceptron {'-'.join(map(str, (height * width, *options.hidden, classes)))}",
        (height, width),
    )
    made.notes.insert(0, f"data: {where}")
    return made


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    return _known(config, facts, None)


def _known(config: RunConfig, facts: Mapping[str, Any], data: Mapping[str, Pictures] | None) -> Task:
    """The task of a kept run with `data`."""
    from deltaw.training.small_networks import perceptron
    from deltaw.training.tasks.image_classification import ImageClassification

    options = Options.model_validate(config.options)
    height, width = facts["picture"]
    return ImageClassification(
        config,
        lambda: perceptron(height * width, options.hidden, len(facts["labels"])),
        data,
        facts["labels"],
        "perceptron",
        (height, width),
    )


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with its data."""
    from deltaw.training.pictures import read_pictures
    from deltaw.training.rows import to_score

    if not other:
        return task(config)
    found, where = read_pictures(config.data.path or Options.model_validate(config.options).source)
    name, (whole,) = to_score(found, where, config.data.split)
    shape, classes = tuple(facts["picture"]), len(facts["labels"])
    if whole.images.shape[1:] != shape or whole.labels.max() >= classes:
        raise DataError(f"{where}: the kept result knows pictures of {shape} and the classes 0 .. {classes - 1} only")
    return _known(config, facts, {name: whole})


def pretrain(config: RunConfig) -> RunConfig | None:
    """The run that makes the base, unless there is one: full training, of which no weight is frozen to be quantised."""
    options = Options.model_validate(config.options)
    if config.model is not None or options.scratch:
        return None
    options_of_it = {**config.options, "scratch": True}
    changes = {"method": "full", "epochs": options.pretrain_epochs, "options": options_of_it, "quantize": None}
    return config.model_copy(update=changes)


register(
    Recipe(
        name="mnist",
        about="handwritten digits: a pretrained perceptron, LoRA against full training (seed 000)",
        task=task,
        kept=kept,
        scored=scored,
        options=Options,
        pretrain=pretrain,
        whole=lambda folder: folder / "model.safetensors",
        methods=("base", "lora", "full"),
        defaults={
            "epochs": 10,
            "batch_size": 64,
            "eval_batch_size": 1000,
            "lr": 0.005,
            "weight_decay": 0.0,
            "warmup": 0.0,
            "schedule": "constant",
            "clip": None,
            "keep": "last",
            "targets": ["1", "3", "5"],
            "lora": {"rank": 4, "alpha": 8, "scaling": "alpha", "init": "gaussian/sqrt(rank)"},
            "data": {"validation": 0.05},
        },
    )
)
