"""kill -9 and signals from outside: the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_killed_at_random_instants_runs_end_bit_identical():
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.kill", "--trials", "10", "--seed", "3"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["differences"] == []
    assert found["identical"] == found["trials"] == 10
    assert found["kills"] >= 6


def start(tiny, folder, *extra):
    command = [
        sys.executable,
        "-m",
        "deltaw.cli",
        "train",
        "text-classification",
        f"model={tiny / 'model'}",
        f"data={tiny / 'data.csv'}",
        "epochs=400",
        "lora.dropout=0.1",
        "checkpoint_every=50",
        *extra,
        "--out",
        str(folder),
    ]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, what):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(tiny, tmp_path, number, code):
    folder = tmp_path / "run"
    process = start(tiny, folder, "keep=last")
    record = folder / "metrics.jsonl"
    wait_for(lambda: record.exists() and record.read_text().count("\n") > 8, process, "training")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "stopped by" in err
    assert "Traceback" not in err
    assert f"deltaw resume {folder}" in err
    assert json.loads((folder / "run.json").read_text())["state"] == "interrupted"
    saved = [p.name for p in (folder / "checkpoints").iterdir()]
    assert saved
    assert not [n for n in saved if "tmp" in n]
    assert not (folder / "adapter_model.safetensors").exists()


def test_ctrl_c_before_training_leaves_nothing(tiny, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny, folder)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun to read the data
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not folder.exists()


def test_resume_through_the_command_line_is_bit_identical(tiny, tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "deltaw.cli", *map(str, arguments)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    killed, calm = tmp_path / "killed", tmp_path / "calm"
    process = start(tiny, killed, "epochs=12")

    def whole():
        return [p for p in killed.glob("checkpoints/step-*/MANIFEST.json") if "tmp" not in p.parent.name]

    wait_for(whole, process, "a checkpoint")
    process.kill()
    process.wait()
    assert "resumed at step" in call("resume", killed)
    assert "is finished" in call("resume", killed)
    process = start(tiny, calm, "epochs=12")
    assert process.wait(timeout=120) == 0
    one, other = load_file(killed / "adapter_model.safetensors"), load_file(calm / "adapter_model.safetensors")
    assert all(torch.equal(one[k], other[k]) for k in {**one, **other})
