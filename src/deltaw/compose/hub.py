"""LoRAHub: find weights for known adapters on a few examples of a new task, without gradients (Huang et al. 2023, arXiv:2307.13269).

Minimise `loss(w) + l1 · Σ|wᵢ|` over w in [-1.5, 1.5]ⁿ from w = 0, by nevergrad's NGOpt in 40 steps: the paper's setting.
Unlike the paper's code the changes themselves are weighted, Σ wᵢ ΔWᵢ, not the factors (see linear.py); on a model that
is `dw.use(model, {name: weight})`, so nothing is written or merged between steps.

The base alone and every adapter alone are measured first: the verdict says whether the search beats them. Every
measurement goes to the trace file at once; started again with the same file, the search replays it and goes on where
it was. Candidates are asked for in rounds of `workers` and told in order, so the result does not depend on which
thread finishes first.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from deltaw.core import options as check
from deltaw.errors import ConfigError, DataError, MissingExtra

Evaluate = Callable[[tuple[float, ...]], float]
"""Weights, one per adapter -> loss on the new task's examples, lower is better. Called from several threads at once
if there are several workers."""

WORST = 1e9
"""Told to the optimizer in place of a loss that is not finite."""
BASE = "base alone"


@dataclass(frozen=True)
class Step:
    """One measurement: the weights, the loss, and the loss with the penalty."""

    weights: tuple[float, ...]
    loss: float
    objective: float


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found. baselines: the loss of the base alone and of every adapter alone with weight 1."""

    names: tuple[str, ...]
    baselines: dict[str, float]
    steps: tuple[Step, ...]

    @property
    def best(self) -> Step:
        """The step with the smallest objective; of equal ones the first."""
        return min(self.steps, key=lambda s: s.objective)

    @property
    def beats_all(self) -> bool:
        """Whether the best weights have a smaller loss than the base and every single adapter, on these examples."""
        return self.best.loss < min(self.baselines.values())

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        name, loss = min(self.baselines.items(), key=lambda item: item[1])
        said = (
            " + ".join(f"{w:.3g} x {n}" for n, w in zip(self.names, self.best.weights) if abs(w) >= 5e-4) or "nothing"
        )
        beats = "beats the base and every single adapter" if self.beats_all else "does NOT beat the best single one"
        return f"{said}: loss {self.best.loss:.4g}; {beats} (best of them: {name}, {loss:.4g})"

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "names": list(self.names),
            "baselines": {n: _json(v) for n, v in self.baselines.items()},
            "best": {"weights": list(self.best.weights), "loss": _json(self.best.loss)},
            "beats_all": self.beats_all,
            "verdict": self.verdict,
            "steps": [{"weights": list(s.weights), "loss": _json(s.loss)} for s in self.steps],
        }


def search(
    names: Sequence[str],
    evaluate: Evaluate,
    *,
    steps: int = 40,
    seed: int = 0,
    l1: float = 0.05,
    bound: float = 1.5,
    workers: int = 1,
    trace: str | os.PathLike[str] | None = None,
    optimizer: str = "NGOpt",
) -> Search:
    """Search weights for the adapters called `names`.

    evaluate: the loss of a weighting on the new task's examples; see `measured` for a model that carries the adapters.
    steps: number of weightings tried, besides the baselines. l1: penalty per unit of weight. bound: weights lie within
        plus and minus this. workers: weightings measured at the same time, in threads.
    seed: of nevergrad; NGOpt takes a method without randomness for some numbers of adapters and steps.
    trace: a JSON-lines file that is written as the search goes, and continued from if it is there.

    Raises:
        ConfigError: options out of range, or a trace that belongs to another search.
        MissingExtra: nevergrad is not installed.
    """
    for name, value in (("steps", steps), ("workers", workers)):
        check.positive_int(name, value)
    check.positive("bound", bound)
    names = tuple(names)
    if not names or len(set(names)) < len(names) or BASE in names:
        raise ConfigError(f"search needs adapters with different names, got {list(names)}")
    header = {
        "names": list(names),
        "steps": steps,
        "seed": seed,
        "l1": l1,
        "bound": bound,
        "workers": workers,
        "optimizer": optimizer,
    }
    tell = _optimizer(header)
    zero = (0.0,) * len(names)
    singles = {BASE: zero} | {n: (*zero[:i], 1.0, *zero[i + 1 :]) for i, n in enumerate(names)}

    with _journal(trace, header) as journal, ThreadPoolExecutor(workers) as threads:

        def measure(candidates: list[tuple[float, ...]]) -> list[float]:
            known = [journal.recall(c) for c in candidates]
            todo = [c for c, k in zip(candidates, known) if k is None]
            fresh = iter(list(threads.map(lambda c: _finite(evaluate(c)), todo)))
            losses = [next(fresh) if k is None else k for k in known]
            for candidate, loss, k in zip(candidates, losses, known):
                if k is None:
                    journal.note(candidate, loss)
            return losses

        baselines = dict(zip(singles, measure(list(singles.values()))))
        if not any(map(math.isfinite, baselines.values())):
            raise DataError(
                "the loss is not finite for the base nor for any single adapter: there is nothing to search"
            )
        made: list[Step] = []
        while len(made) < steps:
            with warnings.catch_warnings():  # about defaults of its own methods that nobody here chose
                warnings.simplefilter("ignore")
                round_ = [tell.ask() for _ in range(min(workers, steps - len(made)))]
            points = [tuple(float(v) for v in asked.value) for asked in round_]
            for asked, weights, loss in zip(round_, points, measure(points)):
                objective = loss + l1 * math.fsum(map(abs, weights))
                tell.tell(asked, objective if math.isfinite(objective) else WORST)
                made.append(Step(weights, loss, objective))
    return Search(names=names, baselines=baselines, steps=tuple(made))


def measured(model: Any, names: Sequence[str], loss: Callable[[Any], float]) -> Evaluate:
    """`evaluate` for a model that carries the adapters `names`: `loss(model)` under `dw.use(model, weights)`."""
    from deltaw.model.activate import use

    def evaluate(weights: tuple[float, ...]) -> float:
        with use(model, {n: w for n, w in zip(names, weights) if w}):
            return loss(model)

    return evaluate


def _json(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _finite(loss: float) -> float:
    loss = float(loss)
    return loss if math.isfinite(loss) else math.inf


def _optimizer(header: dict[str, Any]) -> Any:
    try:
        import nevergrad
        import numpy
    except ImportError as error:
        raise MissingExtra(
            "the search needs nevergrad: pip install 'deltaw[compose]' (or pip install nevergrad)"
        ) from error
    if header["optimizer"] not in nevergrad.optimizers.registry:
        raise ConfigError(f"optimizer={header['optimizer']!r} is none of nevergrad's; 'NGOpt' is the paper's")
    bound = header["bound"]
    with warnings.catch_warnings():  # advice on narrow bounds: the caller's are meant
        warnings.simplefilter("ignore")
        space = nevergrad.p.Array(init=[0.0] * len(header["names"])).set_bounds(-bound, bound)
        space.random_state = numpy.random.RandomState(header["seed"])
        cls = nevergrad.optimizers.registry[header["optimizer"]]
        return cls(parametrization=space, budget=header["steps"], num_workers=header["workers"])


class _Journal:
    """The trace: measurements made before, answered in their order, and new ones written at once."""

    def __init__(self, before: list[dict[str, Any]], file: TextIO | None) -> None:
        self.before = iter(before)
        self.file = file

    def recall(self, weights: tuple[float, ...]) -> float | None:
        """The loss measured at this point of the search before, or None if it never came so far."""
        line = next(self.before, None)
        if line is None:
            return None
        if max(abs(a - b) for a, b in zip(line["weights"], weights)) > 1e-9:
            raise ConfigError(
                "the trace does not repeat: nevergrad proposes other weights than those in it (another version of it?); "
                "start the search anew, with another trace file"
            )
        return math.inf if line["loss"] is None else float(line["loss"])

    def note(self, weights: tuple[float, ...], loss: float) -> None:
        """Write a measurement."""
        if self.file is not None:
            entry = {"weights": list(weights), "loss": _json(loss)}
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())


@contextmanager
def _journal(trace: str | os.PathLike[str] | None, header: dict[str, Any]) -> Iterator[_Journal]:
    if trace is None:
        yield _Journal([], None)
        return
    path = Path(trace)
    lines = _complete_lines(path) if path.exists() else []
    if lines and lines[0] != header:
        differ = [k for k in header if lines[0].get(k) != header[k]]
        raise ConfigError(
            f"{path} is the trace of another search ({', '.join(differ) or 'other options'} differ): "
            f"repeat its options to go on with it, or name another file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if not lines else "r+", encoding="utf-8") as file:
        file.seek(0)
        for line in lines or [header]:  # rewritten so that a line cut short by a crash is gone
            file.write(json.dumps(line) + "\n")
        file.truncate()
        file.flush()
        yield _Journal(lines[1:], file)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            if text.endswith("\n"):
                raise ConfigError(f"{path} is not the trace of a search: line {len(found) + 1} is not JSON") from None
            break  # the last line, cut short
    return found
