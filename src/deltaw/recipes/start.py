"""Start a run of a recipe: its base first, if the recipe makes one, then the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaw.recipes.configure import recipe_of
from deltaw.training.config import RunConfig
from deltaw.training.methods import check_method
from deltaw.training.run import status, train

PRETRAINED = "pretrained"


def start(config: RunConfig, folder: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run `config` in `folder`; returns the results. Errors as `deltaw.training.run.train`."""
    check_method(config)
    recipe = recipe_of(config)
    config = with_base(config, folder, quiet=quiet)
    return train(lambda: recipe.task(config), config, folder, resume=resume, quiet=quiet)


def with_base(config: RunConfig, folder: Path, *, quiet: bool = False) -> RunConfig:
    """`config` with a base to start from: for a recipe that pretrains its own, made in `folder`/pretrained unless it is there."""
    recipe = recipe_of(config)
    base = recipe.pretrain(config) if recipe.pretrain is not None else None
    if base is None:
        return config
    there = folder / PRETRAINED
    if not (there.is_dir() and status(there) == "finished"):
        train(lambda: recipe.task(base), base, there, resume=there.is_dir(), quiet=quiet)
    return config.model_copy(update={"model": str(there / "model" / "model.safetensors")})
