"""audio-classification: your own recordings, one folder of audio files per class, with any Whisper encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.task import Task


class Options(Section):
    """The section `audio-classification`."""

    seconds: float | None = Field(
        None, gt=0, le=30, description="cut or pad recordings to this length; left out: the longest's"
    )
    speed: float = Field(1.0, gt=0, description="playback speed before the log-mel")
    hidden: int = Field(256, gt=0, description="units of the head's hidden layer")
    shift: float = Field(
        0.0, ge=0, lt=30, description="augmentation: in each epoch, move a recording by up to so many seconds"
    )


def task(config: RunConfig) -> Task:
    """The task with its data."""
    from deltaw.training.tasks.audio_classification import AudioClassification

    options = Options.model_validate(config.options)
    return AudioClassification(
        config, speed=options.speed, hidden=options.hidden, shift=options.shift, seconds=options.seconds
    )


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    from deltaw.training.tasks.audio_classification import AudioClassification

    return AudioClassification(config, labels=facts["labels"], shape=facts["shape"], read="no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data of the kept run's classes, cut to its length."""
    from deltaw.training.tasks.audio_classification import AudioClassification

    shape = facts["shape"]
    return AudioClassification(
        config,
        seconds=shape["samples"] / shape["rate"],
        labels=facts["labels"],
        shape=shape,
        read="whole" if other else "splits",
    )


register(
    Recipe(
        name="audio-classification",
        about="your own recordings, a folder of audio files per class (data=FOLDER), with any Whisper encoder",
        task=task,
        kept=kept,
        scored=scored,
        options=Options,
        methods=("full", "head", "lora", "dora"),
        defaults={
            "model": "openai/whisper-small",
            "targets": ["q_proj", "k_proj", "v_proj"],
            "lora": {"rank": 8, "alpha": 8},
            "epochs": 10,
            "batch_size": 16,
            "eval_batch_size": 32,
            "lr": {"head": 1e-3, "full": 1e-4, "default": 5e-4},
        },
    )
)
