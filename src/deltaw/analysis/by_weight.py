"""What every finding looks like: a mapping from the name of a weight to what was found there, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class ByWeight(Mapping[str, T], Generic[T]):
    """Parameter name -> finding. skipped: parameter name -> why it has none."""

    weights: Mapping[str, T]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> T:
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def lines(self, head: str, rows: Mapping[str, str]) -> str:
        """The printed form: a line per weight under `head`, then what was left out."""
        wide = max([len(key) for key in rows] + [6])
        made = [f"{'weight':{wide}}  {head}", *(f"{key:{wide}}  {row}" for key, row in rows.items())]
        return "\n".join([*made, *(f"left out: {k} ({why})" for k, why in self.skipped.items())])
