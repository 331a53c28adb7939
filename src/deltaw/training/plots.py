"""The two figures of a comparison, as PNG: metric over epochs, metric over training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltaw.errors import MissingExtra
from deltaw.training.verdict import Compared

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#666666")
"""Okabe and Ito's, which people with any colour vision tell apart."""
MARKERS = "osD^vPX*"


def draw(rows: Sequence[Compared], metric: str, folder: Path) -> list[Path]:
    """Write both figures into `folder`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("figures need matplotlib: pip install 'deltaw[train]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    written = []
    for column, label, name in (
        (0, "epoch", "metric_over_epochs.png"),
        (1, "training time (s)", "metric_over_time.png"),
    ):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=150, layout="constrained")
        for i, row in enumerate(rows):
            colour, said = COLOURS[i % len(COLOURS)], f"{row.method} (best {row.score:.4f})"
            if not row.curve:
                axes.axhline(row.score, color=colour, linewidth=1.4, linestyle="--", label=said)
                continue
            axes.plot(
                [point[column] for point in row.curve],
                [point[2] for point in row.curve],
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                label=said,
            )
        axes.set_xlabel(label)
        axes.set_ylabel(f"validation {metric}")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
        path = folder / name
        figure.savefig(path)
        pyplot.close(figure)
        written.append(path)
    return written
