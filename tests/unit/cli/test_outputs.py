"""What `--overwrite` may take away and when, exit codes that are gates, and a run that is resumed with something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.cli.outputs import new_folder
from deltaw.errors import ConfigError


def listed(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(kept_run, tmp_path):
    return shutil.copytree(kept_run, tmp_path / "run")


@pytest.fixture
def words(tiny):
    return ["train", "text-classification", f"model={tiny / 'model'}", f"data={tiny / 'data.csv'}", "epochs=1"]


@pytest.mark.parametrize("wrong", ["data=nosuch.csv", "model=./nosuch", "lr=-1", "targets=qury", "report_to=foo"])
def test_nothing_is_replaced_by_a_run_that_cannot_begin(deltaw, run, words, wrong):
    before = listed(run)
    deltaw(*words, wrong, "--out", run, "--overwrite", code=3 if "nosuch" in wrong else 2)
    assert listed(run) == before
    assert [p.name for p in run.parent.iterdir() if "replaced" in p.name] == []


def test_a_run_replaces_a_run_and_nothing_else(deltaw, run, words, tmp_path):
    before = listed(run)
    answer = deltaw("analyze", run, "--out", run, "--overwrite", code=2)
    assert "holds a run, which is not replaced" in answer.err
    assert listed(run) == before
    deltaw("analyze", run, "--out", "report")
    deltaw("analyze", run, "--out", "report", "--overwrite")
    assert "holds a report" in deltaw(*words, "--out", "report", "--overwrite", code=2).err
    deltaw(*words, "--out", run, "--overwrite")
    assert listed(run).keys() <= before.keys() | {"deltaw_manifest.json"}
    assert listed(run) != before
    assert [p.name for p in tmp_path.iterdir() if "replaced" in p.name] == []


def test_only_what_is_unfinished_is_said_to_go_on(tmp_path):
    def refusal(out):
        with pytest.raises(ConfigError) as told, new_folder(str(out), "run", False, "run"):
            pass
        return str(told.value)

    assert refusal("") == "--out is empty: name a folder, or leave the option out"
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file").endswith("is a file: choose another name for the folder")
    for mark, unfinished in {"analysis.json": False, "run.json": True, "compare.json": True}.items():
        folder = tmp_path / mark.partition(".")[0]
        folder.mkdir()
        (folder / mark).write_text("{}")
        assert ("`deltaw resume" in refusal(folder)) == unfinished
        (folder / "results.json").write_text("{}")
        assert "exists: choose another folder" in refusal(folder)
        assert "resume" not in refusal(folder)


def test_a_comparison_that_cannot_begin_takes_nothing_away(deltaw, tiny, tmp_path):
    words = ["compare", "text-classification", f"model={tiny / 'model'}", "epochs=1", "--methods", "head", "--out", "c"]
    deltaw(*words, f"data={tiny / 'data.csv'}")
    before = listed(tmp_path / "c")
    deltaw(*words, "data=nosuch.csv", "--overwrite", code=3)
    assert listed(tmp_path / "c") == before


@contextmanager
def training(words, where):
    """A run that trains in another process, in `where`/live, from its first checkpoint on; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltaw.cli", *words, "epochs=5000", "checkpoint_every=5", "--out", "live"],
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while not [p for p in (where / "live").glob("checkpoints/step-*") if ".tmp-" not in p.name]:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_in_which_a_process_trains_is_not_replaced(deltaw, words, tmp_path):
    with training(words, tmp_path) as process:
        assert "another process is training" in deltaw(*words, "--out", "live", "--overwrite", code=2).err
        assert process.poll() is None
        assert (tmp_path / "live" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("change", ["base", "labels", "fewer"])
def test_a_run_goes_on_only_from_what_it_began_with(deltaw, tiny, tmp_path, change):
    shutil.copytree(tiny / "model", tmp_path / "model")
    shutil.copy(tiny / "data.csv", tmp_path / "data.csv")
    with training(["train", "text-classification", "model=model", "data=data.csv"], tmp_path):
        pass
    header, *lines = (tmp_path / "data.csv").read_text().splitlines()
    if change == "base":
        weights = tmp_path / "model" / "model.safetensors"
        save_file({k: 1.5 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    elif change == "labels":
        other = {"good": "bad", "bad": "good"}
        lines = [f"{text},{other[label]}" for text, label in (line.rsplit(",", 1) for line in lines)]
        (tmp_path / "data.csv").write_text("\n".join([header, *lines]) + "\n")
    else:
        (tmp_path / "data.csv").write_text("\n".join([header, *lines[:-20]]) + "\n")
    answer = deltaw("resume", "live", code=2)
    assert ("the base" if change == "base" else "the data: ") in answer.err
    assert "is not what this run began with" in answer.err


def test_a_signal_at_the_very_end_shows_no_traceback():
    hook = "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))"
    code = f"import atexit, os, signal, sys, time; {hook}; sys.argv = ['deltaw', '--version']; import deltaw.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout.startswith("deltaw ")
    assert done.stderr == ""


def test_gates_that_fail_end_with_2(deltaw, run, tiny, tmp_path):
    deltaw("check", run, "--base", tiny / "model")
    save_file({"other.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    answer = deltaw("check", run, "--base", tmp_path / "other.safetensors", "--json", code=2)
    assert json.loads(answer.out)["fine"] is False


def test_a_score_that_is_not_defined_ends_no_run(deltaw, tiny, tmp_path):
    header, *lines = (tiny / "data.csv").read_text().splitlines()
    label = lines[0].rpartition(",")[2]
    same = [line for line in lines if line.endswith(f",{label}")]
    other = next(line for line in lines if not line.endswith(f",{label}"))
    (tmp_path / "data").mkdir()
    for split, rows in {"train": [*same[:30], other], "validation": same[30:40], "test": same[40:50]}.items():
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n")
    words = ["train", "text-classification", f"model={tiny / 'model'}", "data=data", "epochs=1", "--out", "run"]
    told = json.loads(deltaw(*words, "--json").out)
    assert told["test"]["auc"] is None
    for name in ("results.json", "deltaw_manifest.json"):
        json.loads((tmp_path / "run" / name).read_text(), parse_constant=lambda word: pytest.fail(word))
    deltaw("predict", "run", "a wonderful film")
