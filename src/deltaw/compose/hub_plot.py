"""The picture of a LoRAHub search: losses step by step beside the baselines, and the weights that won."""

from __future__ import annotations

import itertools
from pathlib import Path

from deltaw.compose.hub import Search, Step
from deltaw.errors import MissingExtra


def _better(one: Step, other: Step) -> Step:
    return other if other.objective < one.objective else one


def plot(found: Search, path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib: pip install matplotlib") from error
    fig = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    numbers = range(1, len(found.steps) + 1)
    left.plot(numbers, [s.loss for s in found.steps], "o", markersize=4, color="#97bbf5", label="tried")
    best: list[Step] = list(itertools.accumulate(found.steps, _better))
    left.plot(numbers, [s.loss for s in best], color="#4269d0", label="best so far (with penalty)")
    for n, (name, loss) in enumerate(sorted(found.baselines.items(), key=lambda item: item[1])[:4]):
        left.axhline(loss, color="#ff725c", linewidth=1, linestyle=("-", "--", "-.", ":")[n], label=name)
    left.set(xlabel="step", ylabel="loss on the examples")
    left.legend(fontsize=7, frameon=False)
    right.barh(found.names, found.best.weights, color=["#4269d0" if w >= 0 else "#ff725c" for w in found.best.weights])
    right.axvline(0, color="#888888", linewidth=0.8)
    right.set(xlabel="weight of the best step")
    right.tick_params(axis="y", labelsize=7)
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, format="png")
