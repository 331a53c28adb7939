"""The README's Python and every script under examples/ run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def run(code: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *code], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=[p.name for p in SCRIPTS])
def test_examples_run(path, tmp_path):
    assert run([str(path)], tmp_path)


def test_the_readme_example_runs_and_keeps_what_peft_reads(tmp_path):
    (code,) = README
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    out = run(["-c", code], tmp_path)
    assert "trainable" in out
    assert "merged default" in out
    assert (tmp_path / "adapters" / "sum" / "adapter_config.json").is_file()
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(tmp_path / "adapters" / "sum").r == 4


def test_every_command_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^    deltaw ([a-z]+)", text, re.M))
    there = {p.stem for p in (ROOT / "src/deltaw/cli/commands").glob("*.py")} | {"init", "config"}
    assert named <= there
    assert {"train", "compare", "predict", "merge"} <= named
