"""What the loop decides: when to stop, which epoch to keep, how fast to learn, and that merging changes no score."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.recipes.configure import build
from deltaw.recipes.kept import open_kept
from deltaw.recipes.recipe import recipes
from deltaw.training.run import train
from deltaw.training.scoring import evaluate

STEPS = 8  # an epoch's


class Scored:
    """A task whose validation accuracies are made up: one after the other."""

    def __init__(self, task, scores):
        self.task, self.scores = task, iter(scores)

    def __getattr__(self, name):
        return getattr(self.task, name)

    def tally(self):
        tally, score = self.task.tally(), next(self.scores, 0.0)
        real = tally.scores
        tally.scores = lambda: {**real(), "accuracy": score}
        return tally


@pytest.fixture
def run(tiny, tmp_path):
    """Train into tmp_path/`name`; returns (results, weights)."""

    def call(name, scores=None, **changes):
        given = {
            "recipe": "text-classification", "model": str(tiny / "model"), "data": str(tiny / "data.csv"),
            "batch_size": 8, "lr": 5e-3, "cache_prefix": False, "log_every": 1, **changes,
        }  # fmt: skip
        config = build(given)

        def make():
            task = recipes["text-classification"].task(config)
            return task if scores is None else Scored(task, scores)

        results = train(make, config, tmp_path / name, quiet=True)
        return results, load_file(tmp_path / name / "adapter_model.safetensors")

    return call


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_best_epoch_is_kept_and_patience_ends_the_run(run):
    constant = {"schedule": "constant", "warmup": 0}  # so that epoch 2 of 9 is epoch 2 of 2
    results, kept = run("patient", [0.2, 0.9, 0.9, 0.3], epochs=9, patience=2, **constant)
    assert [row["epoch"] for row in results["history"]] == [1, 2, 3, 4], "an equal score is no better score"
    assert results["best"]["epoch"] == 2
    _, two = run("two", epochs=2, keep="last", **constant)
    assert equal(kept, two)
    _, last = run("last", [0.2, 0.9, 0.9, 0.3], epochs=4, keep="last", **constant)
    assert not equal(kept, last)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_torchs_own_schedulers_give_the_same_rates(run, tmp_path, schedule):
    run("run", epochs=2, schedule=schedule, warmup=0.25)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["event"] == "step"]
    total, rising = 2 * STEPS, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
    shapes = torch.optim.lr_scheduler
    falling = {
        "linear": lambda: shapes.LinearLR(optimizer, 1.0, 0.0, total_iters=total - rising),
        "cosine": lambda: shapes.CosineAnnealingLR(optimizer, total - rising),
        "constant": lambda: shapes.ConstantLR(optimizer, 1.0),
    }[schedule]()
    expected = [5e-3 * (step + 1) / rising for step in range(rising)]
    for _ in range(total - rising):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        falling.step()
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_or_separate_the_scores_are_equal(run, tmp_path, method):
    """The same numbers up to fp32 rounding, and those that the run itself has written down."""
    results, _ = run("run", epochs=2, method=method)
    config, _, model = open_kept(tmp_path / "run")
    task = recipes["text-classification"].task(config)
    separate = evaluate(model, task, config, "test")
    assert separate == pytest.approx(results["test"], rel=1e-6)
    dw.merge(model)
    merged = evaluate(model, task, config, "test")
    assert merged["loss"] == pytest.approx(separate["loss"], rel=1e-5)
    assert merged["accuracy"] == separate["accuracy"]
    dw.unmerge(model)
    with dw.disabled(model):
        base = evaluate(model, task, config, "test")
    assert abs(base["loss"] - separate["loss"]) > 1e-4, "the adapter does something: more than rounding"
