"""The frozen prefix: a training step with it played back, over the same step computing everything (and the run's cost).

Real recipes on small data: `sentiment` with LoRA on the top two of MiniLM's six layers, `gw` with its own targets (q, k, v
of every layer: only the convolutions lie below) and with the top two of whisper-tiny's four. Losses are asserted equal.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import SEED, alternate, medians, ratio, record, row
from deltaw.recipes.configure import build, recipe_of
from deltaw.training.config import RunConfig
from deltaw.training.methods import prepare
from deltaw.training.order import batches
from deltaw.training.prefix_run import frozen_prefix
from deltaw.training.signals_file import Signals, write_signals

WHISPER = Path(__file__).resolve().parents[2] / "shared" / "models" / "whisper-tiny-en"


def strains(folder: Path, count: int = 96) -> Path:
    """Seeded noise in the shape of gw's data: timings do not depend on what it says."""
    for split in ("train", "validation"):
        waves = np.random.default_rng(SEED).normal(size=(count, 3, 4096)).astype(np.float32)
        labels = np.arange(count) % 2
        made = Signals(waves=waves, labels=labels, rate=2048.0, names=["noise", "signal"], channels=["H1", "L1", "V1"])
        write_signals(folder / f"{split}.safetensors", made)
    return folder


def steps(config: RunConfig, folder: Path) -> tuple[dict[str, Callable[[], object]], float]:
    """A step with and a step without the prefix played back, and the bytes that one example takes on disk."""
    task = recipe_of(config).task(config)
    model = task.build()
    prepare(model, task, config)
    loss = lambda batch: task.loss(model, batch)  # noqa: E731
    made = frozen_prefix(model, task, config, folder, loss, model.train, print)
    assert made is not None, "no prefix"
    prefix, rows, _ = made
    order = batches(len(task.splits["train"]), config.batch_size, SEED, 0, task.lengths("train"))
    chosen = [i for i in order if len(i) == config.batch_size][len(order) // 2]
    batch = task.collate([task.example("train", i, None) for i in chosen])
    own = [rows["train"][i] for i in chosen]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    model.train()

    def plain() -> torch.Tensor:
        found, _ = task.loss(model, dict(batch))
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    def played() -> torch.Tensor:
        with prefix.playing(own):
            return plain()

    one, other = plain().item(), played().item()
    assert abs(one - other) <= 1e-4 * abs(one), f"losses differ: {one} and {other}"
    return {"played": played, "plain": plain}, prefix.row_bytes(max((r.length for r in own), default=0))


def main(rounds: int = 15) -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases: dict[str, dict[str, Any]] = {
            "MiniLM, LoRA on the top 2 of 6 layers": {
                "recipe": "sentiment",
                "targets": r".*layer\.(4|5)\..*(query|key|value|dense)",
                "data": {"limit": 256},
            }
        }
        if WHISPER.is_dir():
            gw = {"recipe": "gw", "model": str(WHISPER), "data": str(strains(folder))}
            cases["gw, whisper-tiny, LoRA on q, k, v of all layers"] = gw
            cases["gw, whisper-tiny, LoRA on the top 2 of 4 layers"] = {
                **gw,
                "targets": r".*layers\.(2|3)\..*(q|k|v)_proj",
            }
        rows, table = [], {}
        for name, given in cases.items():
            both, size = steps(build(given), folder)
            times = alternate(both, rounds)
            rows.append(row(f"{name}: step with prefix / without", ratio(times, "played", "plain")))
            table[name] = {**medians(times), "bytes_per_example": size}
        record("prefix", rows, milliseconds=table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
