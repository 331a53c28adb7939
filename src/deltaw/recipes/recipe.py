"""`Recipe`: a task with the configuration that it starts from. One file of this folder each; importing it registers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.core.registry import Registry
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.task import Task


class NoOptions(Section):
    """A recipe without options of its own."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A runnable task.

    name, about: what `deltaw recipes` lists. defaults: keys of the configuration that differ from the general ones.
    methods: what `deltaw compare` runs unless told otherwise. options: the recipe's own section, named as the recipe.
    task: configuration -> task. kept: (configuration, facts of a kept result) -> the task without its data, to predict.
    scored: (configuration, facts, whether the data are other ones) -> the task with data, its classes as kept.
    pretrain: configuration -> the configuration of a run that makes the base first, or None if the base is there.
    whole: folder of a model trained in full -> what `model` must be to load it.
    """

    name: str
    about: str
    task: Callable[[RunConfig], Task]
    kept: Callable[[RunConfig, Mapping[str, Any]], Task] | None = None
    scored: Callable[[RunConfig, Mapping[str, Any], bool], Task] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    methods: Sequence[str] = ("head", "lora", "dora", "full")
    options: type[Section] = NoOptions
    pretrain: Callable[[RunConfig], RunConfig | None] | None = None
    whole: Callable[[Path], Path] = lambda folder: folder


recipes: Registry[Recipe] = Registry("recipe", "deltaw.recipes")


def register(recipe: Recipe) -> Recipe:
    """Make `recipe` known by its name."""
    return recipes.register(recipe.name, recipe)
