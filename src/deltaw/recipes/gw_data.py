"""The gravitational-wave data set: `gw_waves.sample` over indices, in several processes, into files of signals."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.errors import ConfigError
from deltaw.recipes.gw_waves import DETECTORS, FACTS, RATE, Sky, sample
from deltaw.training.checkpoint import write_atomic
from deltaw.training.signals_file import Signals, write_signals

NAMES = ("noise", "signal")
CHUNK = 50
README = "dataset.json"


def make(
    folder: Path,
    sizes: dict[str, int],
    seed: int,
    sky: Sky,
    *,
    dtype: str = "float16",
    processes: int | None = None,
    said: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `folder`/SPLIT.safetensors for each split of `sizes` (its number of samples) and `folder`/dataset.json.

    Sample i of a split is the same whatever its size is and however many processes there are. Half of the samples hold
    a signal. said: called with (samples done, of how many).

    Raises:
        ConfigError: a size is odd or not positive. MissingExtra: lalsuite is not installed.
    """
    for split, size in sizes.items():
        if size <= 0 or size % 2:
            raise ConfigError(f"{split}: {size} samples; an even number is wanted, half of them with a signal")
    folder.mkdir(parents=True, exist_ok=True)
    total, done = sum(sizes.values()), 0
    about = {
        "recipe": "gw",
        "seed": seed,
        **asdict(sky),
        "dtype": dtype,
        "rate": RATE,
        "detectors": list(DETECTORS),
        "lalsuite": version("lalsuite"),
        "numpy": version("numpy"),
    }
    workers = max(1, min(processes or os.cpu_count() or 1, 8))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for split, size in sizes.items():
            work = partial(_chunk, seed, split, size, sky, dtype)
            parts = []
            for part in map(work, range(0, size, CHUNK)) if workers == 1 else pool.map(work, range(0, size, CHUNK)):
                parts.append(part)
                done += len(part[0])
                if said is not None:
                    said(done, total)
            write_signals(
                folder / f"{split}.safetensors",
                Signals(
                    waves=np.concatenate([p[0] for p in parts]),
                    labels=np.concatenate([p[1] for p in parts]),
                    rate=float(RATE),
                    names=NAMES,
                    channels=list(DETECTORS),
                    columns={k: np.concatenate([p[2][k] for p in parts]) for k in FACTS},
                    about={**about, "split": split},
                ),
            )
    facts = {**about, "sizes": sizes}
    write_atomic(folder / README, json.dumps(facts, indent=2) + "\n")
    return facts


def _chunk(
    seed: int, split: str, size: int, sky: Sky, dtype: str, first: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """CHUNK samples from `first` on: waves, labels, parameters (NaN where there is no signal)."""
    found = [sample(seed, split, i, sky) for i in range(first, min(first + CHUNK, size))]
    return (
        np.stack([s.data for s in found]).astype(dtype),
        np.array([s.signal for s in found]),
        {name: np.array([s.facts.get(name, np.nan) for s in found]) for name in FACTS},
    )
