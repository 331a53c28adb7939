"""Which inputs does an adapter change most, and where do two adapters disagree?

Answers are probability distributions over the same names (classes, tokens); their distance is the total variation
½ Σ |p - q|: 0 for equal answers, 1 for answers that share nothing, and for two classes simply the shift in probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.errors import DataError

Answer = Mapping[str, float]
"""Name -> probability."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two sets of answers to the same inputs. order: the inputs' places, the most different first."""

    names: tuple[str, str]
    distances: tuple[float, ...]
    flips: tuple[bool, ...]
    """Whether the most probable name differs."""
    order: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean distance over the inputs."""
        return sum(self.distances) / len(self.distances)

    @property
    def flipped(self) -> float:
        """Share of inputs whose most probable name differs."""
        return sum(self.flips) / len(self.flips)

    def table(self, inputs: Sequence[str], one: Sequence[Answer], other: Sequence[Answer]) -> list[dict[str, Any]]:
        """One row per input, the most different first, for printing and JSON."""
        return [
            {
                "input": inputs[n],
                "distance": self.distances[n],
                self.names[0]: top(one[n]),
                self.names[1]: top(other[n]),
                "probabilities": {self.names[0]: dict(one[n]), self.names[1]: dict(other[n])},
            }
            for n in self.order
        ]


def total_variation(one: Answer, other: Answer) -> float:
    """½ Σ |p - q| over the names of both."""
    return sum(abs(one.get(name, 0.0) - other.get(name, 0.0)) for name in {**one, **other}) / 2


def top(answer: Answer) -> str:
    """The most probable name; of equal ones the first."""
    return max(answer, key=lambda name: answer[name])


def difference(names: tuple[str, str], one: Sequence[Answer], other: Sequence[Answer]) -> Difference:
    """Compare the answers called `names[0]` and `names[1]`, input by input.

    Raises:
        DataError: nothing to compare, not as many answers in one as in the other, or an answer without probabilities.
    """
    if len(one) != len(other) or not one:
        raise DataError(
            f"{len(one)} answers of {names[0]} and {len(other)} of {names[1]}: they must answer the same inputs"
        )
    if not all(one) or not all(other):
        raise DataError(f"answers of {names[0]} or {names[1]} say no probabilities: their distance is not defined")
    distances = tuple(total_variation(a, b) for a, b in zip(one, other))
    order = sorted(range(len(one)), key=lambda n: -distances[n])
    flips = tuple(top(a) != top(b) for a, b in zip(one, other))
    return Difference(names=names, distances=distances, flips=flips, order=tuple(order))
