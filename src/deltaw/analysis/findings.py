"""Everything that can be said about some adapters, as numbers and as sentences: what `deltaw analyze` finds out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

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

    def sentences(self) -> list[str]:
        """What came out, in plain words."""
        said = []
        for name, s in self.spectra.items():
            said.append(f"{name}: {len(s)} weights, ‖ΔW‖ {s.norm:.3g}; {s.advice(self.energy).text}")
        for (a, b), sides in self.pairs.items():
            means = {side: float(np.mean([s.above_random for s in found.values()])) for side, found in sides.items()}
            said.append(
                f"{a} and {b}: directions agree {means['in']:z.2f} in, {means['out']:z.2f} out (0 random, 1 nested)"
            )
        said += [f"{a} and {b}: {why}" for (a, b), why in self.apart.items()]
        for name, rows in self.amplification.items():
            factors = [x.factor for x in rows.values() if math.isfinite(x.factor)]
            places = [x.emphasis for x in rows.values() if math.isfinite(x.emphasis)]
            if factors:
                said.append(
                    f"{name}: amplification {np.median(factors):.2f} (median; from {min(factors):.2f} to {max(factors):.2f})"
                )
            if places:
                said[-1] += (
                    f"; W along ΔW's directions lies at {np.median(places):.2f} between random (0) and its own top (1)"
                )
        for name, table in self.intruders.items():
            count = sum(w.count for w in table.values())
            if table:
                said.append(
                    f"{name}: {count} intruder dimensions in {sum(w.count > 0 for w in table.values())} of {len(table)} weights"
                )
        return said

    def left_out(self) -> list[str]:
        """Why which weights of which adapters are missing, one sentence per reason."""
        why: dict[tuple[str, str], list[str]] = {}
        for name, s in self.spectra.items():
            for key, reason in s.skipped.items():
                why.setdefault((reason, key), []).append(name)
        grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (reason, key), names in why.items():
            grouped.setdefault((reason, tuple(names)), []).append(key)
        return [
            f"Left out of {' and '.join(names)}: {', '.join(_few(keys))} ({reason})."
            for (reason, names), keys in grouped.items()
        ]

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


def _few(keys: list[str], most: int = 6) -> Iterator[str]:
    yield from keys[:most]
    if len(keys) > most:
        yield f"and {len(keys) - most} more"
