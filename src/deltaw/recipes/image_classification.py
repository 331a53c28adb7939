"""image-classification: your own pictures, with a network of transformers, timm or torchvision, or a small one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltaw.errors import DataError
from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.task import Task
    from deltaw.training.vision_models import VisionModel


class Options(Section):
    """The section `image-classification`."""

    size: int | None = Field(
        None, gt=0, description="side of the pictures in pixels; left out: the network's own (cnn, mlp: 32)"
    )
    pretrained: bool = Field(True, description="timm, torchvision: with the library's weights, or random ones")
    flip: bool = Field(False, description="augmentation: exchange left and right of every second picture")
    crop: float = Field(
        1.0, gt=0, le=1, description="augmentation: cut out at least this share of the area, anew in each epoch"
    )


def network(config: RunConfig) -> VisionModel:
    """The network that the configuration names."""
    from deltaw.training.vision_models import KINDS, VisionModel

    if config.model is None:
        raise DataError(f"no model: set model= ({KINDS})")
    options = Options.model_validate(config.options)
    return VisionModel(config.model, config.revision, options.pretrained, options.size)


def task(config: RunConfig) -> Task:
    """The task with its data."""
    from deltaw.training.tasks.photo_classification import PhotoClassification

    options = Options.model_validate(config.options)
    return PhotoClassification(config, network(config), flip=options.flip, crop=options.crop)


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    from deltaw.training.tasks.photo_classification import PhotoClassification

    return PhotoClassification(config, network(config), labels=facts["labels"], prepared=facts["prepared"], read="no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data, for the classes of a kept run."""
    from deltaw.training.tasks.photo_classification import PhotoClassification

    return PhotoClassification(
        config,
        network(config),
        labels=facts["labels"],
        prepared=facts["prepared"],
        read="whole" if other else "splits",
    )


register(
    Recipe(
        name="image-classification",
        about="your own pictures (data=FOLDER, table, npz or hub id) with a ViT, a ResNet, timm:NAME, cnn ... (model=)",
        task=task,
        kept=kept,
        scored=scored,
        options=Options,
        defaults={
            "model": "google/vit-base-patch16-224-in21k",
            "data": {"text": "image"},
            "lr": {"head": 3e-3, "full": 5e-5, "default": 5e-4},
        },
    )
)
