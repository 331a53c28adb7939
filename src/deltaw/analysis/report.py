"""The findings as files: `report.html` (one page, no scripts), its pictures as PNGs, and `analysis.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.analysis import page, plots
from deltaw.analysis.findings import Analysis

MANY_PAIRS = 6
"""With more pairs of adapters only the overview is drawn, not a picture for each."""

Show = Callable[[str, Any, str, str], None]
"""File name, figure, title, how to read it."""


def write(analysis: Analysis, folder: Path, title: str = "What the adapters learned") -> list[Path]:
    """Write `analysis.json`, one PNG per picture and the self-contained `report.html` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "analysis.json"]
    written[0].write_text(json.dumps(analysis.facts(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    parts: list[str] = []

    def show(name: str, figure: Any, title: str, text: str) -> None:
        data = page.png(figure)
        path = folder / f"{name}.png"
        path.write_bytes(data)
        written.append(path)
        parts.append(page.image(data, title, text))

    parts.append(page.sentences(analysis.sentences()))
    parts += [page.paragraph(text, soft=True) for text in analysis.left_out()]
    _spectra(analysis, parts, show)
    _pairs(analysis, parts, show)
    _base(analysis, parts, show)
    path = folder / "report.html"
    subtitle = (
        f"{len(analysis.spectra)} adapters: {', '.join(analysis.spectra)}"
        if len(analysis.spectra) > 1
        else next(iter(analysis.spectra))
    )
    path.write_text(page.document(title, subtitle, parts), encoding="utf-8")
    return [*written, path]


def _spectra(analysis: Analysis, parts: list[str], show: Show) -> None:
    parts.append(page.heading("How many directions, and where"))
    rows = []
    for name, s in analysis.spectra.items():
        advice = s.advice(analysis.energy)
        rows.append(
            {
                "name": name,
                "weights": len(s),
                "norm": s.norm,
                "effective": float(np.mean([w.effective_rank for w in s.values()])) if s else None,
                "given": advice.given,
                "advice": advice.text,
            }
        )
    parts.append(
        page.table(
            rows,
            {
                "name": "adapter",
                "weights": "weights",
                "norm": "‖ΔW‖",
                "effective": "effective rank (mean)",
                "given": "trained rank",
                "advice": "advice",
            },
        )
    )
    drawn = {name: s for name, s in analysis.spectra.items() if s and s.norm}
    if not drawn:
        return
    show(
        "spectra",
        plots.spectra(drawn),
        "Singular values of ΔW.",
        "One line per weight. A steep fall means that fewer directions would do.",
    )
    show(
        "shares",
        plots.by_layer(
            {n: {k: 100 * v for k, v in s.shares().items()} for n, s in drawn.items()}, "% of ‖ΔW‖²", "{:.1f}", add=True
        ),
        "Where the change is.",
        "The share of ‖ΔW‖² of every weight, in per cent.",
    )
    show(
        "effective-rank",
        plots.by_layer(
            {n: {k: w.effective_rank for k, w in s.items()} for n, s in drawn.items()}, "effective rank", "{:.1f}"
        ),
        "Effective rank.",
        "The number of equal singular values that would have the same entropy.",
    )
    for name, s in drawn.items():
        parts.append(
            page.table(
                s.table(),
                {
                    "weight": "weight",
                    "rank": "rank",
                    "effective_rank": "effective rank",
                    "stable_rank": "stable rank",
                    "rank_for_95": "95 % at",
                    "norm": "‖ΔW‖",
                    "share": "share",
                },
                f"{name}, weight by weight",
            )
        )


def _pairs(analysis: Analysis, parts: list[str], show: Show) -> None:
    if not analysis.pairs and not analysis.apart:
        return
    parts.append(page.heading("Do they use the same directions?"))
    parts.append(
        page.paragraph(
            "φ(i, j) is the share of the smaller of two spans that lies in the other: 1 nested, 0 orthogonal. "
            "Two random spans in d dimensions have max(i, j)/d; only what lies above that says something."
        )
    )
    names = list(analysis.spectra)
    if len(names) > 2:
        for side, what in (("in", "inputs that ΔW reads"), ("out", "outputs that ΔW writes")):
            grid = np.full((len(names), len(names)), np.nan)
            np.fill_diagonal(grid, 1.0)
            for (a, b), sides in analysis.pairs.items():
                value = float(np.mean([s.above_random for s in sides[side].values()]))
                grid[names.index(a), names.index(b)] = grid[names.index(b), names.index(a)] = value
            show(
                f"pairs-{side}",
                plots.pairs(names, grid),
                f"All pairs: {what}.",
                "How far above random their spans agree, mean over weights.",
            )
    if len(analysis.pairs) > MANY_PAIRS:
        return
    for n, ((a, b), sides) in enumerate(analysis.pairs.items(), 1):
        for side, what in (
            ("in", "inputs that ΔW reads (right singular directions)"),
            ("out", "outputs that ΔW writes (left singular directions)"),
        ):
            show(
                f"similarity-{n}-{side}",
                plots.similarity(sides[side], (a, b)),
                f"{a} and {b}: {what}.",
                "Left what was found, middle what random directions would give, right the difference.",
            )
        show(
            f"similarity-{n}-layers",
            plots.by_layer(
                {
                    f"{what}": {k: s.above_random for k, s in sides[side].items()}
                    for side, what in (("in", "inputs read"), ("out", "outputs written"))
                },
                "above random",
                vmin=0,
                vmax=1,
                cmap="magma",
            ),
            f"{a} and {b}, weight by weight.",
            "(φ - random) / (1 - random) of all directions.",
        )


def _base(analysis: Analysis, parts: list[str], show: Show) -> None:
    if not analysis.amplification:
        return
    drawn = {name: a for name, a in analysis.amplification.items() if a}
    if not drawn:
        return
    parts.append(page.heading("How the change lies to the base weights"))
    parts.append(
        page.paragraph(
            "Amplification is ‖ΔW‖ / ‖UᵀWV‖ with U, V the directions of ΔW: how much more the adapter does along them "
            "than W itself did. W's size along its own top directions and along random ones is the scale to read it by."
        )
    )
    show(
        "amplification",
        plots.amplification(drawn),
        "Sizes along directions.",
        "What ΔW adds, what W has in the same directions, and what it has in its own top ones and in random ones.",
    )
    show(
        "amplification-factor",
        plots.by_layer(
            {n: {k: x.factor for k, x in a.items() if math.isfinite(x.factor)} for n, a in drawn.items()},
            "factor",
            "{:.1f}",
        ),
        "Amplification factor, weight by weight.",
        "‖ΔW‖ / ‖UᵀWV‖.",
    )
    show(
        "overlap",
        plots.overlap(analysis.overlap),
        "Does ΔW read the directions that W reads most?",
        "How much of ΔW's input directions lies in the span of W's first j.",
    )
    for name, a in drawn.items():
        parts.append(
            page.table(
                a.table(),
                {
                    "weight": "weight",
                    "rank": "r",
                    "change_norm": "‖ΔW‖",
                    "weight_norm": "‖W‖",
                    "along_change": "W along ΔW",
                    "along_weight": "W along W",
                    "along_random": "W along random",
                    "factor": "factor",
                },
                f"{name}, weight by weight",
            )
        )
    counted = {name: {k: float(w.count) for k, w in t.items()} for name, t in analysis.intruders.items() if t}
    if counted:
        found = [w for t in analysis.intruders.values() for w in t.values()]
        many, threshold = max(len(w.cosines) for w in found), found[0].threshold
        show(
            "intruders",
            plots.by_layer(counted, "intruders", "{:.0f}", vmin=0, vmax=many),
            "Intruder dimensions.",
            f"How many of the top {many} output directions of W + ΔW resemble none of W's (all |cos| < {threshold:g}).",
        )
