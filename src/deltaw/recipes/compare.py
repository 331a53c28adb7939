"""Compare methods: each in a process of its own, because a process's peak memory never falls.

    DIR/  compare.json (what was asked)  METHOD.yaml  METHOD/ (a run each)  pretrained/ (if the recipe makes its base)
          results.json  metrics.jsonl  report.html  table.md  metric_over_epochs.png  metric_over_time.png

A comparison that was stopped goes on where it was: runs that are finished are not run again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from deltaw.errors import ConfigError, DataError, DeltawError
from deltaw.recipes.configure import build, recipe_of
from deltaw.recipes.start import PRETRAINED
from deltaw.training.begun import as_begun, begun
from deltaw.training.checkpoint import write_atomic
from deltaw.training.config import RunConfig
from deltaw.training.methods import check_method
from deltaw.training.place import check_place
from deltaw.training.plots import draw
from deltaw.training.record import read_record, recorded
from deltaw.training.report import page, report, results_json
from deltaw.training.run import RESULTS, status
from deltaw.training.signals import Interrupted
from deltaw.training.verdict import Compared, compared, verdict

PLAN = "compare.json"
STDERR = 2


class RunFailed(DeltawError):
    """One of the compared runs failed; it has printed why."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"the run {name!r} failed (exit code {code}); see its message above")
        self.exit_code = code


def plan(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, RunConfig]:
    """Name of the run -> its configuration, all checked.

    Raises:
        ConfigError: a method is unknown, comes twice, or its options are wrong.
    """
    if not methods:
        raise ConfigError("--methods is empty: give some, for example --methods head,lora,full")
    found: dict[str, RunConfig] = {}
    for method in methods:
        for seed in seeds:
            name = method.replace(":", "-") + (f"-seed{seed}" if len(seeds) > 1 else "")
            if name in found:
                raise ConfigError(f"method {method!r} is given twice")
            found[name] = config.model_copy(
                update={"method": method, "seed": seed, "keep_checkpoints": min(1, config.keep_checkpoints)}
            )
            check_method(found[name])
    return found


def compare(
    configs: dict[str, RunConfig], folder: Path, command: str, *, aside: bool = False
) -> tuple[list[Compared], str, str]:
    """Run what is not finished yet, then write the report. Returns (rows, the method to take, why).

    aside: what the runs say goes to stderr, so that stdout holds the result alone.

    Raises:
        RunFailed: a run ended with an error, whose exit code this error carries.
        Interrupted, KeyboardInterrupt: a signal came; the comparison can be resumed.
    """
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / PLAN,
        json.dumps({"command": command, "runs": {n: c.nested() for n, c in configs.items()}, **begun(folder)}, indent=2)
        + "\n",
    )
    first = next(iter(configs.values()))
    pretrain = recipe_of(first).pretrain
    base = pretrain(first) if pretrain is not None else None
    if base is not None:
        _run(folder, PRETRAINED, base, aside)
        made = str(folder / PRETRAINED / "model" / "model.safetensors")
        configs = {name: config.model_copy(update={"model": made}) for name, config in configs.items()}
    for name, config in configs.items():
        _run(folder, name, config, aside)
    return write_report(folder, list(configs), yaml.safe_dump(first.nested(), sort_keys=False), command)


def resume(folder: Path) -> tuple[list[Compared], str, str]:
    """Go on with the comparison in `folder`."""
    with as_begun(folder, PLAN) as there:
        runs, command = recorded(there / PLAN, "runs", "command")
        return compare({name: build(nested) for name, nested in runs.items()}, there, command)


def _run(folder: Path, name: str, config: RunConfig, aside: bool) -> None:
    """One run in a child process, unless it is finished already."""
    there = folder / name
    if there.is_dir() and status(there) == "finished":
        return
    if there.is_dir():
        arguments = ["resume", str(there)]
    else:
        write_atomic(folder / f"{name}.yaml", yaml.safe_dump(config.nested(), sort_keys=False))
        arguments = ["train", str(folder / f"{name}.yaml"), "--out", str(there)]
    said = STDERR if aside else None
    code = _wait(subprocess.Popen([sys.executable, "-m", "deltaw.cli", *arguments], stdout=said))
    if code != 0:
        raise RunFailed(name, code)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code. Signals that reach us are passed on, and obeyed when the child has saved and gone."""
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGTERM or len(came) > 1:  # a terminal sends SIGINT to the child itself
            child.send_signal(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    if came:
        raise Interrupted(came[0])
    if code in (130, 143):
        raise Interrupted(code - 128)
    return code if code >= 0 else 128 - code


def write_report(folder: Path, names: Sequence[str], config: str, command: str) -> tuple[list[Compared], str, str]:
    """results.json, metrics.jsonl, report.html and the figures, from the runs in `folder`."""
    runs: list[dict[str, Any]] = []
    for name in names:
        path = folder / name / RESULTS
        if not path.is_file():
            raise DataError(f"{folder / name} has no {RESULTS}: the run is not finished")
        runs.append(json.loads(path.read_text()))
    rows = compared(runs)
    metric = runs[0]["metric"]
    take, sentence = verdict(rows, metric, runs[0]["examples"].get("validation", 1), runs[0]["higher_is_better"])
    lines = [json.dumps({"run": name, **row}) for name in names for row in read_record(folder / name / "metrics.jsonl")]
    write_atomic(folder / "metrics.jsonl", "\n".join(lines) + "\n")
    draw(rows, metric, folder)
    write_atomic(folder / "report.html", report(rows, take, sentence, runs, command, config))
    write_atomic(folder / "table.md", page(rows, sentence, runs, command))
    write_atomic(folder / RESULTS, results_json(rows, take, sentence, runs, command))
    return rows, take, sentence
