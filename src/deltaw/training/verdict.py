"""Several runs side by side: one row per method (mean over its seeds), and which one to take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compared:
    """One method. Scores and costs are means over its seeds; `spread` is the standard deviation of the best score."""

    method: str
    trainable: int
    share: float
    score: float
    spread: float | None
    loss: float
    test: float | None
    seconds: float
    peak_bytes: int
    peak_above_model_bytes: int
    kept_bytes: int
    seeds: int
    curve: tuple[tuple[float, float, float], ...]
    """(epoch, seconds of training, score) of every evaluation."""


def compared(runs: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Rows from the results of runs, in the order in which methods first come."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    return [_row(method, group) for method, group in by_method.items()]


def _row(method: str, group: Sequence[Mapping[str, Any]]) -> Compared:
    metric = group[0]["metric"]

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values)

    scores = [r["best"][metric] for r in group]
    tests = [r["test"][metric] for r in group if r["test"]]
    length = min(len(r["history"]) for r in group)
    curve = tuple(
        (
            r["history"][i]["epoch"],
            mean([g["history"][i]["seconds"] for g in group]),
            mean([g["history"][i][metric] for g in group]),
        )
        for i in range(length)
        for r in group[:1]
    )
    return Compared(
        method,
        group[0]["parameters"]["trainable"],
        group[0]["parameters"]["share"],
        mean(scores),
        statistics.stdev(scores) if len(scores) > 1 else None,
        mean([min((row["loss"] for row in r["history"]), default=r["best"]["loss"]) for r in group]),
        mean(tests) if tests else None,
        mean([r["seconds"] for r in group]),
        max(r["peak_bytes"] for r in group),
        max(r["peak_above_model_bytes"] for r in group),
        group[0]["kept_bytes"],
        len(group),
        curve,
    )


def noise(row: Compared, examples: int) -> float:
    """How far two scores must be apart to differ: the seeds' standard deviation, or the binomial error of one measurement."""
    if row.spread is not None:
        return row.spread
    if 0.0 <= row.score <= 1.0:
        return math.sqrt(max(row.score * (1.0 - row.score), 1e-4) / examples)
    return 0.01 * abs(row.score)


def verdict(rows: Sequence[Compared], metric: str, examples: int, higher_is_better: bool = True) -> tuple[str, str]:
    """(method, sentence): the one that keeps least among those that are as good as the best one, up to noise.

    examples: size of the validation set that the scores were measured on.
    """
    trained = [r for r in rows if r.trainable] or list(rows)
    best = (max if higher_is_better else min)(trained, key=lambda r: r.score)
    margin = noise(best, examples)
    good = [r for r in trained if abs(best.score - r.score) <= margin]
    take = min(good, key=lambda r: (r.kept_bytes, -r.score if higher_is_better else r.score))
    others = [r for r in trained if r is not take]
    if not others:
        return take.method, f"Only {take.method} was trained."
    if take is best:
        second = (max if higher_is_better else min)(others, key=lambda r: r.score)
        ahead = f"the best validation {metric} ({take.score:.4f}; next is {second.method} with {second.score:.4f})"
    else:
        ahead = f"validation {metric} {take.score:.4f}, within the noise (±{margin:.4f}) of the best, {best.method} with {best.score:.4f}"
    costs = f"it keeps {size(take.kept_bytes)} per task"
    full = max(others, key=lambda r: r.kept_bytes)
    if full.kept_bytes > take.kept_bytes:
        costs += f" where {full.method} keeps {size(full.kept_bytes)}"
    if take.seconds > 0 and full.seconds > 0:
        costs += f", and trained in {take.seconds:.0f} s ({full.method}: {full.seconds:.0f} s)"
    return take.method, f"Take {take.method}: {ahead}; {costs}."


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


HEAD = (
    "method",
    "trainable",
    "share",
    "best val {metric}",
    "best val loss",
    "test {metric}",
    "seconds",
    "peak memory",
    "above model",
    "kept per task",
)


def table(rows: Sequence[Compared], metric: str) -> list[tuple[str, ...]]:
    """The comparison as text cells, the heading first."""
    lines: list[tuple[str, ...]] = [tuple(h.format(metric=metric) for h in HEAD)]
    for r in rows:
        spread = f" ± {r.spread:.4f}" if r.spread is not None else ""
        lines.append(
            (
                r.method,
                f"{r.trainable:,}",
                f"{r.share:.2%}",
                f"{r.score:.4f}{spread}",
                f"{r.loss:.4f}",
                "-" if r.test is None else f"{r.test:.4f}",
                f"{r.seconds:.1f}",
                size(r.peak_bytes),
                size(r.peak_above_model_bytes),
                size(r.kept_bytes),
            )
        )
    return lines


def markdown(rows: Sequence[Compared], metric: str) -> str:
    """The comparison as a Markdown table."""
    head, *body = table(rows, metric)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---", *("---:",) * (len(head) - 1)), *body))
