"""Several adapters beside the weights of their base: all measures, with every weight read and decomposed once.

The work is one SVD per weight, however many adapters there are, and one more per adapter for the tuned weight if
intruder dimensions are looked for. Memory is that of the largest weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from deltaw.analysis.amplification import Amplification, Amplifications, amplified
from deltaw.analysis.decomposition import Decomposition
from deltaw.analysis.directions import Directions, Found, without_unchanged
from deltaw.analysis.overlap import Intruders, IntruderTable, intruding, overlapping, without_large
from deltaw.analysis.similarity import Similarities, Similarity
from deltaw.core.base_weights import Base


class Beside(NamedTuple):
    """Adapter -> what was measured, as `amplification`, `overlap` and `intruders` give it for one adapter."""

    amplification: dict[str, Amplifications]
    overlap: dict[str, Similarities]
    intruders: dict[str, IntruderTable]


def beside(
    found: Mapping[str, Found],
    base: Base,
    *,
    top: int = 64,
    intruders: int = 10,
    largest: int | None = None,
    threshold: float = 0.5,
    side: str = "in",
) -> Beside:
    """Measure the adapters whose directions are in `found` (adapter -> `directions(adapter, base)`).

    top, side: of the overlap. intruders: how many directions of W + ΔW are looked at; 0 looks at none, which saves the
    second SVD. largest, threshold: of `intruders`.
    """
    changed = {name: without_unchanged(*each) for name, each in found.items()}
    small = {name: without_large(*each, largest) for name, each in found.items()}
    amplifications: dict[str, dict[str, Amplification]] = {name: {} for name in found}
    overlaps: dict[str, dict[str, Similarity]] = {name: {} for name in found}
    tables: dict[str, dict[str, Intruders]] = {name: {} for name in found}
    for weight, here in _by_base_weight(found):
        W = Decomposition(here[0][1].of.base(base))
        for name, d in here:
            if weight in changed[name][0]:
                overlaps[name][weight] = overlapping(d, W, side, top)
                amplifications[name][weight] = amplified(d, W)
            if intruders and weight in small[name][0]:
                tables[name][weight] = intruding(d, W, top=intruders, threshold=threshold, side="out")
    return Beside(
        {name: Amplifications(rows, changed[name][1]) for name, rows in amplifications.items()},
        {name: Similarities(rows, changed[name][1], side) for name, rows in overlaps.items()},
        {name: IntruderTable(rows, small[name][1]) for name, rows in tables.items()} if intruders else {},
    )


def _by_base_weight(found: Mapping[str, Found]) -> Iterator[tuple[str, list[tuple[str, Directions]]]]:
    """(weight, [(adapter, its directions there)]), together only where all read the base weight the same way."""
    groups: dict[tuple[str, bool, str | None], list[tuple[str, Directions]]] = {}
    for name, (each, _) in found.items():
        for weight, d in each.items():
            change = d.of.change
            groups.setdefault((weight, change.variant.any_shape, change.layer), []).append((name, d))
    for (weight, _, _), here in groups.items():
        yield weight, here
