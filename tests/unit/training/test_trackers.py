"""report_to: what the trackers themselves give back, and that a resumed run goes on in the same tracker run."""

from __future__ import annotations

import json
import sqlite3
import sys

import pytest

from deltaw.errors import ConfigError, MissingExtra
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training import trackers
from deltaw.training.run import train
from tests.unit.training.power_cut import power_cut

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def broken_run(tiny, tmp_path, monkeypatch):
    """Train with `report_to`, die after step 14 (the last checkpoint is step 9's), resume; returns the folder."""

    def call(report_to):
        given = {
            "recipe": "text-classification", "model": str(tiny / "model"), "data": str(tiny / "data.csv"), "epochs": 3,
            "batch_size": 8, "checkpoint_every": 9, "log_every": 2, "report_to": report_to, "lr": 5e-3,
        }  # fmt: skip
        config = build(given)
        folder = tmp_path / "run"
        with power_cut(14):
            train(lambda: recipes["text-classification"].task(config), config, folder, quiet=True)
        train(lambda: recipes["text-classification"].task(config), config, folder, resume=True, quiet=True)
        return folder

    return call


def recorded(folder):
    """(step, loss) of every step row, and (step, accuracy) of every evaluation, of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["step"], r["loss"]) for r in rows if r["event"] == "step"]
    return steps, [(r["step"], r["accuracy"]) for r in rows if r["event"] == "epoch"]


def test_tensorboard(broken_run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = broken_run("tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    steps, epochs = recorded(folder)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(s, pytest.approx(v)) for s, v in steps]
    assert [(e.step, e.value) for e in events.Scalars("validation/accuracy")] == [
        (s, pytest.approx(v)) for s, v in epochs
    ]
    assert len(events.Scalars("test/accuracy")) == 1
    assert len(steps) == 12


def test_mlflow(broken_run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    mlflow.set_tracking_uri(None)
    folder = broken_run(["mlflow"])
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'text-classification'")
    (only,) = client.search_runs([experiment.experiment_id])
    steps, epochs = recorded(folder)
    found = sorted((m.step, m.value) for m in client.get_metric_history(only.info.run_id, "train/loss"))
    assert found == [(s, pytest.approx(v)) for s, v in steps]
    scores = sorted((m.step, m.value) for m in client.get_metric_history(only.info.run_id, "validation/accuracy"))
    assert scores == [(s, pytest.approx(v)) for s, v in epochs]
    assert only.data.params["batch_size"] == "8"
    assert only.info.status == "FINISHED"


def wandb_records(content):
    """The records of a .wandb file: 32 KiB blocks of chunks, each with crc (4 bytes), length (2) and part (1)."""
    place, pieces = 7, []  # after the file's own header
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, part = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        pieces.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if part in (1, 4):  # whole, or the last piece
            yield b"".join(pieces)
            pieces = []


def test_wandb_offline(broken_run, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    folder = broken_run("wandb")
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "both processes wrote the same run id"
    losses, accuracies = [], []
    for file in files:
        for data in wandb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num or row.get("_step")
            losses += [(step, row["train/loss"])] if "train/loss" in row else []
            accuracies += [(step, row["validation/accuracy"])] if "validation/accuracy" in row else []
    steps, epochs = recorded(folder)
    assert losses == [(s, pytest.approx(v)) for s, v in steps]
    assert accuracies == [(s, pytest.approx(v)) for s, v in epochs]


def test_trackio(broken_run, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    for module in [m for name, m in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):  # each has read the variable when it was imported
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    folder = broken_run("trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    found = [(step, json.loads(m)["train/loss"]) for _, step, m in rows if "train/loss" in json.loads(m)]
    assert found == [(s, pytest.approx(v)) for s, v in recorded(folder)[0]]


def test_names_are_checked_before_anything_is_loaded(monkeypatch):
    assert trackers.chosen("none") == trackers.chosen([]) == []
    with pytest.raises(ConfigError, match=r"'tensorbord': unknown tracker; did you mean 'tensorboard'"):
        trackers.chosen("tensorbord")
    monkeypatch.setattr(trackers, "_installed", lambda name: name == "mlflow")
    assert trackers.chosen("all") == ["mlflow"]
    with pytest.raises(MissingExtra, match=r"report_to=wandb: .* pip install wandb"):
        trackers.chosen("mlflow,wandb")


def test_a_missing_package_stops_the_run_before_its_task_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_installed", lambda name: False)
    config = build({"recipe": "mnist", "report_to": ["trackio"]})
    with pytest.raises(MissingExtra, match="pip install trackio"):
        train(lambda: pytest.fail("the task was built"), config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_dropped_and_told(tmp_path):
    said = []
    found = trackers.Trackers([], tmp_path, "project", {}, said.append)

    class Failing:
        def log(self, values, step):
            raise ConnectionError("no network")

    class Working:
        rows: list = []  # noqa: RUF012

        def log(self, values, step):
            self.rows.append((step, values))

    found.live = {"wandb": Failing(), "mlflow": Working()}
    for step in (1, 2):
        found.report({"event": "step", "step": step, "epoch": 0.5, "loss": 1.0, "seconds": 3})
    assert [s for s in said if "wandb" in s] == said
    assert len(said) == 1
    assert "no network" in said[0]
    assert Working.rows == [(1, {"train/loss": 1.0}), (2, {"train/loss": 1.0})]
