"""The entry function for Ray Train: what `deltaw train` does, in the workers of a `TorchTrainer`.

    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer
    from deltaw.recipes.ray_train import train_func

    settings = {"recipe": "sft", "out": "/shared/runs/sft", "batch_size": 8, "lora.rank": 16}
    TorchTrainer(train_func, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=2)).fit()

Ray starts the processes and connects them; the loop finds them as under torchrun. A run that Ray starts again after a
failure (`FailureConfig(max_failures=...)`) goes on from its own newest checkpoint, so `out` must be a folder that all
workers reach.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaw.errors import ConfigError
from deltaw.recipes.configure import load
from deltaw.recipes.start import start
from deltaw.training.record import METRICS
from deltaw.training.run import RESULTS, STATUS, status


def train_func(config: Mapping[str, Any]) -> None:
    """Train what `config` says: `recipe` (or the path of a YAML file), `out` (an absolute folder), and any settings.

    Reports to Ray at the end: the best evaluation's scores, those of the test split, and the kept adapter (or model)
    as a checkpoint.

    Raises:
        ConfigError: `recipe` or `out` is missing, `out` is relative, or a setting is wrong.
    """
    import ray.train  # type: ignore[import-not-found]

    settings = dict(config)
    missing = [key for key in ("recipe", "out") if not settings.get(key)]
    if missing:
        raise ConfigError(
            f"train_loop_config has no {missing[0]!r}: give recipe (or a YAML file) and out (the run's folder)"
        )
    source, folder = str(settings.pop("recipe")), Path(settings.pop("out"))
    if not folder.is_absolute():
        raise ConfigError(f"out={folder}: Ray's workers run in folders of their own; give an absolute path")
    run = load(source, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    begun = (folder / STATUS).is_file()
    finished = begun and status(folder) == "finished"
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # all have looked before one of them begins to write
    if not finished:
        start(run, folder, resume=begun)
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({})
        return
    results = json.loads((folder / RESULTS).read_text())
    scores = {**results["best"], **{f"test_{k}": v for k, v in (results["test"] or {}).items()}}
    with tempfile.TemporaryDirectory() as aside:
        kept = folder / "model" if (folder / "model").is_dir() else folder
        for path in kept.iterdir():
            if path.is_file() and path.name != METRICS:
                shutil.copy(path, aside)
        ray.train.report(scores, checkpoint=ray.train.Checkpoint.from_directory(aside))
