"""gw: seed 001's experiment. Black holes merging, or only noise? Whisper's encoder hears three detectors' strain.

The seed: 1,000 + 1,000 samples, whisper-small, rank 8 and alpha 8 on query, key and value, 20 epochs, validation AUC.
Playing 2 s of strain back 4 times faster before the log-mel moves 20-500 Hz to where Whisper listens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.task import Task


class Options(Section):
    """The section `gw`."""

    speed: float = Field(4.0, gt=0, description="playback speed of the strain before the log-mel")
    hidden: int = Field(256, gt=0, description="units of the head's hidden layer")
    shift: float = Field(
        0.0, ge=0, lt=1, description="augmentation: in each epoch, move a sample by up to so many seconds"
    )


def task(config: RunConfig) -> Task:
    """The task with its data."""
    from deltaw.training.tasks.audio_classification import AudioClassification

    options = Options.model_validate(config.options)
    return AudioClassification(config, speed=options.speed, hidden=options.hidden, shift=options.shift)


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    from deltaw.training.tasks.audio_classification import AudioClassification

    return AudioClassification(config, labels=facts["labels"], shape=facts["shape"], read="no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data of the kept run's classes and shape."""
    from deltaw.training.tasks.audio_classification import AudioClassification

    return AudioClassification(
        config, labels=facts["labels"], shape=facts["shape"], read="whole" if other else "splits"
    )


register(
    Recipe(
        name="gw",
        about="gravitational waves in detector noise: a Whisper encoder on 3 detectors (seed 001); data: `deltaw data gw`",
        task=task,
        kept=kept,
        scored=scored,
        options=Options,
        methods=("full", "head", "lora", "dora"),
        defaults={
            "model": "openai/whisper-small",
            "data": {"path": "gw-data"},
            "targets": ["q_proj", "k_proj", "v_proj"],
            "lora": {"rank": 8, "alpha": 8},
            "epochs": 20,
            "batch_size": 32,
            "eval_batch_size": 100,
            "lr": {"head": 1e-3, "full": 2e-4, "default": 5e-4},
            "warmup": 0.1,
            "clip": 1.0,
        },
    )
)
