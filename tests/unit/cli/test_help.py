"""`deltaw --help` imports nothing heavy, so it answers at once."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
sys.argv = ["deltaw", *{arguments!r}]
from deltaw.cli import main
try:
    main()
except SystemExit as end:
    heavy = {{"torch", "transformers", "numpy", "accelerate", "datasets", "yaml"}} & set(sys.modules)
    print("HEAVY", sorted(heavy), end.code)
"""


def heavy_after(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_needs_no_torch():
    out = heavy_after("--help")
    assert "HEAVY [] 0" in out
    for command in ("train", "compare", "predict", "eval", "inspect", "merge", "recipes", "init", "config", "resume"):
        assert f"  {command} " in out


def test_help_of_a_command_needs_no_torch():
    assert "HEAVY [] 0" in heavy_after("train", "--help")


def test_the_package_runs_as_a_module_too():
    told = subprocess.run([sys.executable, "-m", "deltaw", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("deltaw 0.")


def test_version():
    assert heavy_after("--version").startswith("deltaw 0.")
