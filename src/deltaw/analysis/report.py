"""Everything that can be said about some adapters, as numbers, pictures and one page: what `deltaw analyze` writes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.analysis import page, plots
from deltaw.analysis.amplification import Amplifications
from deltaw.analysis.beside import beside
from deltaw.analysis.directions import directions
from deltaw.analysis.overlap import IntruderTable
from deltaw.analysis.similarity import Similarities, compare
from deltaw.analysis.spectrum import Spectra, spectra
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base
from deltaw.errors import ConfigError

FULL_SVD_UP_TO = 2048
"""Larger weights are searched for intruder dimensions only if that is asked for."""

MANY_PAIRS = 6
"""With more pairs of adapters only the overview is drawn, not a picture for each."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The findings. Pairs are named by the names of both; what needs the base is empty without one."""

    energy: float
    spectra: Mapping[str, Spectra]
    pairs: Mapping[tuple[str, str], Mapping[str, Similarities]] = field(default_factory=dict)
    apart: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Pairs that have nothing to compare, and why."""
    amplification: Mapping[str, Amplifications] = field(default_factory=dict)
    overlap: Mapping[str, Similarities] = field(default_factory=dict)
    intruders: Mapping[str, IntruderTable] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """All numbers, as JSON values."""
        return {
            "adapters": {
                name: {
                    "norm": s.norm,
                    "advice": {**vars(s.advice(self.energy))},
                    "share_by_layer": {str(k): v for k, v in s.shares_by_layer().items()},
                    "share_by_kind": s.shares_by_kind(),
                    "weights": s.table(),
                    "left_out": dict(s.skipped),
                }
                for name, s in self.spectra.items()
            },
            "pairs": [
                {
                    "a": a,
                    "b": b,
                    **{side: {"weights": s.table(), "left_out": dict(s.skipped)} for side, s in sides.items()},
                }
                for (a, b), sides in self.pairs.items()
            ],
            "not_comparable": [{"a": a, "b": b, "why": why} for (a, b), why in self.apart.items()],
            "amplification": {name: a.table() for name, a in self.amplification.items()},
            "overlap": {name: o.table() for name, o in self.overlap.items()},
            "intruders": {name: i.table() for name, i in self.intruders.items()},
        }


def analyze(
    adapters: Mapping[str, Adapter],
    base: Base | None = None,
    *,
    energy: float = 0.95,
    top: int = 64,
    intruders_of: int | None = None,
) -> Analysis:
    """Spectra of every adapter, similarities of every pair, and with a base how the changes lie to its weights.

    top: how many of W's leading directions to compare with.
    intruders_of: how many of W + ΔW's to look for in W's, which takes a full SVD of every weight; 0 leaves it out, None
        takes 10 where the smaller side of a weight is at most FULL_SVD_UP_TO.
    """
    if not adapters:
        raise ConfigError("analyze needs at least one adapter")
    found = {name: directions(a, base) for name, a in adapters.items()}
    pairs: dict[tuple[str, str], dict[str, Similarities]] = {}
    apart: dict[tuple[str, str], str] = {}
    for a, b in itertools.combinations(adapters, 2):
        try:
            two = (adapters[a], adapters[b]), (found[a], found[b])
            sides = {side: compare(*two, side=side) for side in ("in", "out")}
        except ConfigError as error:
            apart[a, b] = str(error)
            continue
        if all(sides.values()):
            pairs[a, b] = sides
        else:
            apart[a, b] = "no weight is changed by both"
    result = Analysis(
        energy=energy, spectra={name: spectra(*each) for name, each in found.items()}, pairs=pairs, apart=apart
    )
    if base is None:
        return result
    largest = FULL_SVD_UP_TO if intruders_of is None else None
    measured = beside(found, base, top=top, intruders=10 if intruders_of is None else intruders_of, largest=largest)
    return replace(result, **measured._asdict())


def write(analysis: Analysis, folder: Path, title: str = "What the adapters learned") -> list[Path]:
    """Write `analysis.json`, one PNG per picture and the self-contained `report.html` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "analysis.json"]
    written[0].write_text(json.dumps(analysis.facts(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    parts: list[str] = []

    def show(name: str, figure: Any, caption: str) -> None:
        data = page.png(figure)
        path = folder / f"{name}.png"
        path.write_bytes(data)
        written.append(path)
        parts.append(page.image(data, caption))
        parts.append(page.paragraph(caption, soft=True))

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


def _spectra(analysis: Analysis, parts: list[str], show: Any) -> None:
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
    for name, s in analysis.spectra.items():
        for key, why in s.skipped.items():
            parts.append(page.paragraph(f"Left out of {name}: {key} ({why}).", soft=True))
    drawn = {name: s for name, s in analysis.spectra.items() if s and s.norm}
    if not drawn:
        return
    show(
        "spectra",
        plots.spectra(drawn),
        "Singular values of ΔW, one line per weight. A steep fall means that fewer directions would do.",
    )
    show(
        "shares",
        plots.by_layer(
            {n: {k: 100 * v for k, v in s.shares().items()} for n, s in drawn.items()}, "% of ‖ΔW‖²", "{:.1f}", add=True
        ),
        "Where the change is: the share of ‖ΔW‖² of every weight, in per cent.",
    )
    show(
        "effective-rank",
        plots.by_layer(
            {n: {k: w.effective_rank for k, w in s.items()} for n, s in drawn.items()}, "effective rank", "{:.1f}"
        ),
        "Effective rank: the number of equal singular values that would have the same entropy.",
    )
    for name, s in drawn.items():
        parts.append(page.paragraph(name))
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
            )
        )


def _pairs(analysis: Analysis, parts: list[str], show: Any) -> None:
    if not analysis.pairs and not analysis.apart:
        return
    parts.append(page.heading("Do they use the same directions?"))
    parts.append(
        page.paragraph(
            "φ(i, j) is the share of the smaller of two spans that lies in the other: 1 nested, 0 orthogonal. "
            "Two random spans in d dimensions have max(i, j)/d; only what lies above that says something."
        )
    )
    for (a, b), why in analysis.apart.items():
        parts.append(page.paragraph(f"{a} and {b}: {why}", soft=True))
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
                f"How far above random the spans agree, mean over weights: {what}.",
            )
    if len(analysis.pairs) > MANY_PAIRS:
        return
    for n, ((a, b), sides) in enumerate(analysis.pairs.items(), 1):
        for side, what in (
            ("in", "inputs that ΔW reads (right singular directions)"),
            ("out", "outputs that ΔW writes (left singular directions)"),
        ):
            show(f"similarity-{n}-{side}", plots.similarity(sides[side], (a, b)), f"{a} and {b}: {what}.")
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
            f"{a} and {b}, weight by weight: (φ - random) / (1 - random) of all directions.",
        )


def _base(analysis: Analysis, parts: list[str], show: Any) -> None:
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
    for name, a in drawn.items():
        finite = [x.factor for x in a.values() if math.isfinite(x.factor)]
        places = [x.emphasis for x in a.values() if math.isfinite(x.emphasis)]
        text = (
            f"{name}: median amplification {np.median(finite):.2f} (from {min(finite):.2f} to {max(finite):.2f})"
            if finite
            else name
        )
        if places:
            text += f"; W along ΔW's directions lies at {np.median(places):.2f} between random (0) and its own top (1), on a log scale"
        parts.append(page.paragraph(text + "."))
    show("amplification", plots.amplification(drawn), "Sizes along directions: what ΔW adds, and what W has there.")
    show(
        "amplification-factor",
        plots.by_layer(
            {n: {k: x.factor for k, x in a.items() if math.isfinite(x.factor)} for n, a in drawn.items()},
            "factor",
            "{:.2f}",
        ),
        "Amplification factor, weight by weight.",
    )
    show(
        "overlap",
        plots.overlap(analysis.overlap),
        "How much of ΔW's input directions lies in the span of W's first j; dotted: random directions.",
    )
    for name, a in drawn.items():
        parts.append(page.paragraph(name))
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
            )
        )
    counted = {name: {k: float(w.count) for k, w in t.items()} for name, t in analysis.intruders.items() if t}
    if counted:
        many = max(len(w.cosines) for t in analysis.intruders.values() for w in t.values())
        show(
            "intruders",
            plots.by_layer(counted, "intruders", "{:.0f}", vmin=0, vmax=many),
            f"Intruder dimensions: how many of the top {many} output directions of W + ΔW resemble none of W's (all |cos| < {next(iter(next(t for t in analysis.intruders.values() if t).values())).threshold:g}).",
        )
