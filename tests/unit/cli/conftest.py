"""A tiny model, data, and the command line as a user runs it: a process with an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_text import make_data, make_model


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with model/ and data.csv."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    make_data(folder / "data.csv")
    return folder


@pytest.fixture
def deltaw(tmp_path):
    """Run `deltaw ...` in `tmp_path`."""

    def call(*arguments: object, code: int | None = 0, **options: object) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "deltaw.cli", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            **options,  # type: ignore[call-overload]
        )
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def kept_run(tiny, tmp_path_factory) -> Path:
    """A finished LoRA run on the tiny model."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "deltaw.cli",
            "train",
            "text-classification",
            f"model={tiny / 'model'}",
            f"data={tiny / 'data.csv'}",
            "epochs=2",
            "--out",
            str(folder),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    return folder
