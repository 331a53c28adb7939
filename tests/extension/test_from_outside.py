"""A method, a layer and a form of the frozen weight from outside, one file each: found by entry point, and every law holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).parent / "plugin"
NAMES = ("outside_variant", "outside_layer", "outside_form")


@pytest.fixture
def environment(tmp_path):
    """An environment in which the three files are installed as a package with entry points."""
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deltaw.plugins]\n" + "".join(f"{n} = {n}\n" for n in NAMES))
    path = os.pathsep.join([str(tmp_path), str(PLUGIN), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    ("chosen", "files", "least"),
    [
        ("Modulated", ["tests/laws/test_equivalence.py", "tests/laws/test_gradients.py", "tests/unit/model/test_quantize.py"], 300),
        ("bilinear", ["tests/laws/test_equivalence.py", "tests/laws/test_gradients.py"], 300),
        ("Float8", ["tests/unit/model/test_quantize.py"], 30),
    ],
)  # fmt: skip
def test_every_law_runs_over_what_comes_from_outside(environment, chosen, files, least):
    result = python(environment, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert result.returncode == 0, result.stdout[-3000:]
    dots = sum(line.count(".") for line in result.stdout.splitlines() if re.fullmatch(r"[.s]+ +\[ *\d+%\]", line))
    assert dots >= least, result.stdout[-500:]


def test_it_is_known_by_name(environment):
    code = (
        "from deltaw.core.registry import forms, hosts, variants;"
        "print(variants['modulated'](), hosts['bilinear'].family, forms['float8']())"
    )
    assert python(environment, "-c", code).stdout.split() == ["Modulated()", "bilinear", "Float8()"]
