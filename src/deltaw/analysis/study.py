"""The rank study of Hu et al. 2021 (arXiv:2106.09685, section 7) on any task: tables 6 and 7, figures 3 and 4.

Given adapters trained at several ranks and seeds: the score over the rank, how far the directions of a small and a
large rank agree, how far those of two seeds do, and what the changes amplify. Every figure stands beside what random
directions would give. The findings are put into words as they come out, whichever way that is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.analysis import page, plots
from deltaw.analysis.amplification import Amplifications
from deltaw.analysis.beside import beside
from deltaw.analysis.directions import directions
from deltaw.analysis.similarity import Similarities, similarity
from deltaw.analysis.spectrum import spectrum
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base

SHARED = 0.5
"""φ(1, 1) above which two top directions are called shared: the paper reads "> 0.5" off its figure 3."""

AS_A_PICTURE = (
    "Left what was found, middle what random directions would give, right the difference; means over the weights."
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained adapter of the grid. scores: metric -> value on held-out data."""

    rank: int
    seed: int
    adapter: Adapter
    scores: Mapping[str, float]
    parameters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """The grid's findings. ranks: (small, large) that were compared; seeds: two at one rank."""

    metric: str
    higher_is_better: bool
    rows: list[dict[str, Any]]
    ranks: tuple[int, int] | None
    across_ranks: Similarities | None
    seeds: tuple[int, int] | None
    seeds_rank: int
    across_seeds: Similarities | None
    amplified: Mapping[int, Amplifications]

    def findings(self) -> list[str]:
        """What came out, sentence by sentence."""
        said = []
        pick = max if self.higher_is_better else min
        best = pick(self.rows, key=lambda r: r["mean"])
        near = [r for r in self.rows if abs(r["mean"] - best["mean"]) <= max(best["spread"], r["spread"], 1e-12)]
        said.append(
            f"Best {self.metric} at rank {best['rank']} ({best['mean']:.4f} ± {best['spread']:.4f} over seeds); "
            f"within that spread already from rank {min(r['rank'] for r in near)}."
        )
        for found, what in (
            (self.across_ranks, f"ranks {self.ranks[0]} and {self.ranks[1]}" if self.ranks else ""),
            (self.across_seeds, f"two seeds of rank {self.seeds_rank}"),
        ):
            if found is None:
                continue
            first, random = [s.at(1, 1) for s in found.values()], [float(s.baseline[0, 0]) for s in found.values()]
            whole, expected = [s.whole for s in found.values()], [float(s.baseline[-1, -1]) for s in found.values()]
            share = float(np.mean([f > SHARED for f in first]))
            said.append(
                f"Top input direction of {what}: φ(1,1) = {np.mean(first):.2f} on average, random {np.mean(random):.3f}; shared "
                f"(> {SHARED}) in {share:.0%} of the weights. All directions: φ = {np.mean(whole):.2f}, random {np.mean(expected):.2f}."
            )
        for rank, rows in self.amplified.items():
            factors = [a.factor for a in rows.values() if math.isfinite(a.factor)]
            places = [a.emphasis for a in rows.values() if math.isfinite(a.emphasis)]
            if factors and places:
                said.append(
                    f"Rank {rank}: median amplification {np.median(factors):.2f}; W along ΔW's directions lies at "
                    f"{np.median(places):.2f} between random (0) and W's own top directions (1), on a log scale."
                )
        return said

    def facts(self) -> dict[str, Any]:
        """All numbers, as JSON values."""
        return {
            "metric": self.metric,
            "rows": self.rows,
            "findings": self.findings(),
            "across_ranks": {"ranks": self.ranks, "weights": _table(self.across_ranks)},
            "across_seeds": {"seeds": self.seeds, "rank": self.seeds_rank, "weights": _table(self.across_seeds)},
            "amplification": {str(rank): a.table() for rank, a in self.amplified.items()},
        }


def study(
    runs: list[Run], metric: str, base: Base | None = None, *, higher_is_better: bool = True, of: str = "change"
) -> Study:
    """Compare the runs of a grid of ranks and seeds. Trained copies (a new head) have no rank and are left out.

    of: directions of the "change" ΔW, or of the "factors" as in the paper (see similarity.py).
    """
    runs = [replace(run, adapter=_ranked(run.adapter)) for run in runs]
    by = {(run.rank, run.seed): run for run in runs}
    ranks = sorted({run.rank for run in runs})
    seeds = sorted({run.seed for run in runs})
    rows = []
    for rank in ranks:
        same = [by[rank, s] for s in seeds if (rank, s) in by]
        values = [float(run.scores[metric]) for run in same]
        found = [spectrum(run.adapter) for run in same]
        rows.append(
            {
                "rank": rank,
                "parameters": same[0].parameters,
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                "values": values,
                "seconds": float(np.mean([run.seconds for run in same])),
                "norm": float(np.mean([s.norm for s in found])),
                "effective_rank": float(np.mean([w.effective_rank for s in found for w in s.values()])),
            }
        )
    large = ranks[-1]
    small = 8 if 8 in ranks[:-1] else ranks[-2] if len(ranks) > 1 else None
    first = seeds[0]
    between = (
        None if small is None else similarity(by[small, first].adapter, by[large, first].adapter, of=of, base=base)
    )
    twins = next(((r, seeds[0], seeds[1]) for r in reversed(ranks) if len(seeds) > 1 and (r, seeds[1]) in by), None)
    alike = (
        None
        if twins is None
        else similarity(by[twins[0], twins[1]].adapter, by[twins[0], twins[2]].adapter, of=of, base=base)
    )
    amplified: Mapping[int, Amplifications] = {}
    if base is not None:
        found_at = {str(r): directions(by[r, first].adapter, base) for r in ranks if (r, first) in by}
        measured = beside(found_at, base, intruders=0).amplification
        amplified = {int(r): rows for r, rows in measured.items()}
    return Study(
        metric=metric,
        higher_is_better=higher_is_better,
        rows=rows,
        ranks=None if small is None else (small, large),
        across_ranks=between,
        seeds=None if twins is None else (twins[1], twins[2]),
        seeds_rank=large if twins is None else twins[0],
        across_seeds=alike,
        amplified=amplified,
    )


def write(found: Study, folder: Path, title: str, subtitle: str) -> None:
    """Write `study.json`, `study.md`, the PNGs and `report.html` into `folder`."""
    (folder / "study.json").write_text(json.dumps(found.facts(), indent=1) + "\n", encoding="utf-8")
    parts = [page.sentences(found.findings())]
    columns = {
        "rank": "rank",
        "parameters": "parameters",
        "mean": found.metric,
        "spread": "± over seeds",
        "norm": "‖ΔW‖",
        "effective_rank": "effective rank",
        "seconds": "seconds",
    }

    def show(name: str, figure: Any, title: str, text: str) -> None:
        data = page.png(figure)
        (folder / f"{name}.png").write_bytes(data)
        parts.append(page.image(data, title, text))

    parts.append(page.heading(f"{found.metric} over the rank (the paper's table 6)"))
    parts.append(page.table(found.rows, columns))
    show(
        "metric-over-rank",
        _over_rank(found),
        f"{found.metric} on held-out data.",
        "A point per seed, a dash at the mean.",
    )
    if found.across_ranks and found.ranks:
        parts.append(page.heading(f"Ranks {found.ranks[0]} and {found.ranks[1]}: the same directions? (figure 3)"))
        names = (f"rank {found.ranks[0]}", f"rank {found.ranks[1]}")
        show("similarity-ranks", plots.similarity(found.across_ranks, names), "Input directions.", AS_A_PICTURE)
    if found.across_seeds and found.seeds:
        parts.append(page.heading(f"Two seeds of rank {found.seeds_rank}: the same directions? (figure 4)"))
        names = (f"seed {found.seeds[0]}", f"seed {found.seeds[1]}")
        show("similarity-seeds", plots.similarity(found.across_seeds, names), "Input directions.", AS_A_PICTURE)
    drawn = {f"rank {r}": a for r, a in found.amplified.items() if a}
    if drawn:
        parts.append(page.heading("What the change amplifies (table 7)"))
        show(
            "amplification",
            plots.amplification(drawn),
            "Sizes along directions.",
            "What ΔW adds, and what W has there.",
        )
    (folder / "report.html").write_text(page.document(title, subtitle, parts), encoding="utf-8")
    (folder / "study.md").write_text(markdown(found, title, subtitle), encoding="utf-8")


def markdown(found: Study, title: str, subtitle: str) -> str:
    """The tables and findings as a Markdown page."""
    lines = [f"# {title}", "", subtitle, "", *(f"- {said}" for said in found.findings()), ""]
    lines += [
        f"| rank | parameters | {found.metric} | ± | effective rank | ‖ΔW‖ | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found.rows:
        lines.append(
            f"| {row['rank']} | {row['parameters']:,} | {row['mean']:.4f} | {row['spread']:.4f} | "
            f"{row['effective_rank']:.1f} | {row['norm']:.2f} | {row['seconds']:.0f} |"
        )
    lines += ["", f"![{found.metric} over the rank](metric-over-rank.png)"]
    if found.across_ranks and found.ranks:
        lines += ["", f"![directions of ranks {found.ranks[0]} and {found.ranks[1]}](similarity-ranks.png)"]
    if found.across_seeds:
        lines += ["", f"![directions of two seeds of rank {found.seeds_rank}](similarity-seeds.png)"]
    if found.amplified:
        lines += [
            "",
            "Medians over the weights, first seed:",
            "",
            "| rank | ‖ΔW‖ | ‖W‖ | W along ΔW | W along W | W along random | amplification |",
            "|---|---|---|---|---|---|---|",
        ]
        for rank, rows in found.amplified.items():
            if rows:
                names = ("change", "weight", "along_change", "along_weight", "along_random", "factor")
                lines.append(f"| {rank} | " + " | ".join(f"{_middle(rows, n):.3g}" for n in names) + " |")
    return "\n".join(lines) + "\n"


def _ranked(adapter: Adapter) -> Adapter:
    return adapter.replace(changes={k: c for k, c in adapter.changes.items() if not c.variant.any_shape})


def _table(found: Similarities | None) -> list[dict[str, Any]]:
    return [] if found is None else found.table()


def _middle(rows: Amplifications, name: str) -> float:
    return float(np.median([getattr(a, name) for a in rows.values()]))


def _over_rank(found: Study) -> Any:
    fig = plots.figure(6.5, 3.8)
    axis = fig.subplots()
    plots.quiet(axis)
    for row in found.rows:
        axis.plot([row["rank"]] * len(row["values"]), row["values"], "o", markersize=4, color="#97bbf5")
    axis.plot(
        [r["rank"] for r in found.rows],
        [r["mean"] for r in found.rows],
        color=plots.COLOURS[0],
        marker="_",
        markersize=12,
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks([r["rank"] for r in found.rows], [str(r["rank"]) for r in found.rows])
    axis.set(xlabel="rank", ylabel=found.metric)
    return fig
