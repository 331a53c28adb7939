"""Open a kept result again: a run's folder, or a bare adapter folder that records which base and recipe it is of."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deltaw.compose.agreement import class_names as names_of
from deltaw.errors import BaseMismatch, ConfigError, DataError
from deltaw.io import AdapterNotice, load, read
from deltaw.io.folder import CONFIG as ADAPTER_CONFIG
from deltaw.model.quantize import kernel_choices
from deltaw.ops.choices import Choices
from deltaw.recipes.configure import build, overridden, recipe_of
from deltaw.recipes.configure import load as load_config
from deltaw.recipes.start import PRETRAINED
from deltaw.training.begun import directory_of, placed
from deltaw.training.config import RunConfig
from deltaw.training.labelled import DROPPED
from deltaw.training.methods import quantize_base
from deltaw.training.record import recorded
from deltaw.training.run import CONFIG, RESULTS, STATUS, status
from deltaw.training.scoring import check_finite, evaluate
from deltaw.training.task import Task

USED = ("data", "model", "revision", "max_length", "eval_batch_size", "bucket")
"""Keys of a configuration that scoring reads, beside the recipe's own."""


def open_kept(folder: Path, model: str | None = None) -> tuple[RunConfig, Task, nn.Module]:
    """(configuration, task without data, model with the trained change) of a run or adapter folder.

    model: the base to use instead of the recorded one (a copy elsewhere); an adapter checks that it is the same.

    Raises:
        DataError: the folder is no run and no adapter, the run is not finished, or a file of it is damaged.
        ConfigError: it does not say which task it is of, or its recipe cannot predict.
        BaseMismatch: the base is another than the one that it was trained on.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    config, facts = described(folder)
    config = config.model_copy(update={"model": model or base_of(config, folder)})
    recipe = recipe_of(config)
    if recipe.kept is None:
        raise ConfigError(f"{folder}: the recipe {recipe.name!r} cannot predict")
    whole = folder / "model"
    if whole.is_dir():
        task = recipe.kept(config.model_copy(update={"model": str(recipe.whole(whole))}), facts)
        return config, task, task.build().eval()
    task = recipe.kept(config, facts)
    bare = task.build()
    if (folder / ADAPTER_CONFIG).is_file():
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", AdapterNotice)
            _loaded(bare, folder)
        for note in notes:
            print(f"note: {note.message}", file=sys.stderr, flush=True)
    _quantized(bare, config, folder)
    return config, task, bare.eval()


def _quantized(bare: nn.Module, config: RunConfig, folder: Path) -> None:
    """Keep the frozen weights as the run did that trained beside them, on the kernels that it noted; time nothing."""
    if quantize_base(bare, config) is None:
        return
    choices = kernel_choices(bare)
    if choices is not None:
        choices.take(Choices.from_json(json.dumps(recorded(folder / STATUS, "kernels")[0])))
        choices.timed = False


def _loaded(bare: nn.Module, folder: Path) -> None:
    """Load the adapter; a mismatch advises what there is here: another base, by `model`."""
    try:
        load(bare, folder)
    except BaseMismatch as error:
        advice = (
            "load that base, or pass allow_base_mismatch=True if you mean this one",
            "name that base with --model (eval: model=)",
        )
        raise BaseMismatch(str(error).replace(*advice)) from error


def base_of(config: RunConfig, folder: Path) -> str | None:
    """The recorded base; where that path is gone, the one that was pretrained in or beside `folder` (which may have moved)."""
    if config.model is not None and config.model.endswith(".safetensors") and not Path(config.model).is_file():
        for near in (folder, folder.parent):
            found = near / PRETRAINED / "model" / "model.safetensors"
            if found.is_file():
                return str(found)
    return config.model


def described(folder: Path) -> tuple[RunConfig, Mapping[str, Any]]:
    """The configuration and the facts (labels ...) of a kept result."""
    if (folder / CONFIG).is_file():
        config = build(placed(load_config(str(folder / CONFIG)).nested(), directory_of(folder, STATUS)))
        if status(folder) != "finished":
            raise DataError(f"{folder}: the run is {status(folder)}, not finished; go on with `deltaw resume {folder}`")
        return config, recorded(folder / RESULTS, "facts")[0]
    if not (folder / ADAPTER_CONFIG).is_file():
        raise DataError(f"{folder} is no run ({CONFIG}) and no adapter ({ADAPTER_CONFIG})")
    adapter = read(folder)
    facts = dict(adapter.extra)
    name = adapter.base.get("name")
    if facts.get("task_type") == "SEQ_CLS":
        facts.setdefault("recipe", "text-classification")
        facts.setdefault("labels", names_of(facts) or class_names(adapter))
    if "recipe" not in facts:
        raise ConfigError(
            f"{folder} does not say which recipe it is of: use dw.load in Python, or keep it in its run folder"
        )
    given = {"recipe": facts["recipe"], **({"model": name} if name else {})}
    if "max_length" in facts:
        given["max_length"] = facts["max_length"]
    return build(given), facts


def class_names(adapter: Any) -> list[str]:
    """LABEL_0, LABEL_1 ...: as many as the rows of the last module trained in full."""
    rows = [change.matrix_shape[0] for change in adapter.changes.values() if change.variant.any_shape]
    if not rows:
        raise ConfigError("the adapter has no classifier of its own and no label map: its number of classes is unknown")
    return [f"LABEL_{i}" for i in range(rows[-1])]


def _check_used(before: RunConfig, now: RunConfig) -> None:
    """Refuse settings that decide how a result is trained, which scoring it cannot change."""
    old, new = before.nested(), now.nested()
    used = (*USED, now.recipe)
    if idle := [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in used]:
        raise ConfigError(
            f"{', '.join(idle)}: a setting of training, which changes nothing in a kept result; "
            f"what can be set to score one: {', '.join(used)}"
        )


def score(folder: Path, overrides: Iterable[str], split: str | None = None) -> dict[str, Any]:
    """Scores of a kept result on `split` of its own data, or of other data (`data=...` among the overrides).

    split: None takes "test"; of other data that has no such part, all.

    Raises:
        ConfigError: its own data have no such split, the recipe cannot be scored, or an override is a setting of training.
        DataError: the data cannot be used, or other data have no such split. NonFinite: the loss is not finite.
    """
    config, facts = described(folder)
    changed = list(overrides)
    other = any(text.partition("=")[0].partition(".")[0] in ("data", "dataset") for text in changed)
    if changed:
        given = config.nested()
        if other:
            given["data"] = {k: given["data"][k] for k in ("text", "label")} | {"split": split}
        before, config = config, overridden(given, changed)
        _check_used(before, config)
    recipe = recipe_of(config)
    if recipe.scored is None:
        raise ConfigError(f"{folder}: results of the recipe {recipe.name!r} cannot be scored")
    _, _, model = open_kept(folder, config.model)
    task = recipe.scored(config, facts, other)
    for note in task.notes:
        if other and note.startswith(DROPPED):
            print(f"note: {note}", file=sys.stderr, flush=True)
    split = next(iter(task.splits)) if other else split or "test"
    if split not in task.splits:
        raise ConfigError(f"--split {split}: the data have {', '.join(task.splits)}")
    task.check_fits(model)
    scores = evaluate(model, task, config, split)
    check_finite(scores, split)
    return {"split": split, "examples": len(task.splits[split]), **scores}
