"""`report_to`: tensorboard, wandb, mlflow and trackio, through Accelerate's trackers.

A run that is resumed goes on in the same tracker run. It repeats the steps after its last checkpoint bit by bit, so
what was reported of them before stands, and is not reported twice: RUN/trackers.json holds each tracker's run id and
the last point that was handed over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, MissingExtra, did_you_mean
from deltaw.training.checkpoint import replace_file

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Name in `report_to` -> the package to install."""

MARK = "trackers.json"
ORDER = {"step": 0, "epoch": 1, "end": 2}
"""Rows of one step come in this order."""
UNNAMED = {"event", "step", "epoch", "seconds", "train_loss", "test"}


def chosen(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that `report_to` means: names, "none", or "all" for those that are installed.

    Raises:
        ConfigError: a name is unknown.
        MissingExtra: a tracker's package is not installed.
    """
    asked = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = [name.strip() for name in asked if name.strip()]
    if names in (["none"], []):
        return []
    if names == ["all"]:
        return [name for name in PACKAGES if _installed(name)]
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(
                f"report_to={name!r}: unknown tracker{did_you_mean(name, PACKAGES)} "
                f"(known: {', '.join(PACKAGES)}; all or none, alone)"
            )
        if not _installed(name):
            raise MissingExtra(f"report_to={name}: its package is not installed: pip install {PACKAGES[name]}")
    return list(dict.fromkeys(names))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name]) is not None


class Trackers:
    """Hands the rows of metrics.jsonl on to the trackers `names` of the run in `folder`.

    config: the run's settings, shown beside its curves. complain: where a tracker's failure is told.

    Raises:
        ConfigError: a tracker cannot be started.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        project: str,
        config: Mapping[str, Any],
        complain: Callable[[str], None],
    ) -> None:
        self.mark = folder / MARK
        self.complain = complain
        kept = json.loads(self.mark.read_text()) if names and self.mark.is_file() else {}
        self.reached: tuple[float, int] = tuple(kept.get("reached", (-1, 0)))
        self.runs: dict[str, str] = dict(kept.get("runs", {}))
        self.live: dict[str, Any] = {}
        for name in names:
            try:
                with _prints_on_stderr():
                    self.live[name] = self._started(name, folder, project, flat(config))
            except Exception as error:
                self.finish()
                raise ConfigError(
                    f"report_to={name}: it cannot be started ({type(error).__name__}: {error}); set it up, or leave it out"
                ) from error
        if names:
            self._note()

    def _started(self, name: str, folder: Path, project: str, config: dict[str, Any]) -> Any:
        """One tracker, in the run that it had before if there is one."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        cls = LOGGER_TYPE_TO_CLASS[name]
        again = name in self.runs
        identity = self.runs.setdefault(name, uuid.uuid4().hex[:8])
        title = folder.resolve().name
        if name == "tensorboard":
            tracker = cls("", str(folder / "tensorboard"))
        elif name == "wandb":
            tracker = cls(project, dir=str(folder), id=identity, name=title, resume="allow")
        elif name == "trackio":
            tracker = cls(project, name=f"{title}-{identity}", resume="allow")
        else:
            tracker = cls(project, run_id=identity if again else None, run_name=title)
        tracker.start()
        if name == "tensorboard":
            if not again:
                tracker.tracker.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))
        elif not again:
            if name == "mlflow":
                self.runs[name] = tracker.tracker.info.run_id
            tracker.store_init_configuration(config)
        return tracker

    def report(self, row: Mapping[str, Any]) -> None:
        """Hand on a row of metrics.jsonl, unless it was handed on before. A tracker that fails is dropped, and said so."""
        point = (row["step"], ORDER[row["event"]])
        if not self.live or point <= self.reached:
            return
        self.reached = point
        self._note()  # before: a point that is lost to a kill in between is better than one that is there twice
        values = named(row)
        for name, tracker in list(self.live.items()):
            try:
                with _prints_on_stderr():
                    tracker.log(values, step=row["step"])
            except Exception as error:
                del self.live[name]
                self.complain(
                    f"report_to={name} failed and gets no more ({type(error).__name__}: {error}); metrics.jsonl goes on"
                )

    def finish(self) -> None:
        """Let the trackers write what they still hold."""
        for name, tracker in self.live.items():
            try:
                with _prints_on_stderr():
                    tracker.finish()
            except Exception as error:
                self.complain(f"report_to={name} failed at its end ({type(error).__name__}: {error})")
        self.live = {}

    def _note(self) -> None:
        replace_file(self.mark, json.dumps({"reached": self.reached, "runs": self.runs}))


def named(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under the names that trackers group by: train/loss, validation/accuracy, test/accuracy."""
    if row["event"] == "end":
        return {f"test/{k}": v for k, v in (row["test"] or {}).items()}
    part = "train" if row["event"] == "step" else "validation"
    return {f"{part}/{k}": v for k, v in row.items() if k not in UNNAMED and isinstance(v, (int, float))}


def flat(nested: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Sections as dotted keys, values that trackers take."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{where}{key}.")
        else:
            found[where + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return found


@contextlib.contextmanager
def _prints_on_stderr() -> Iterator[None]:
    """Trackers greet on stdout, where --json prints its one object."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
