"""How many directions did it learn? Singular values of ΔW per weight, effective ranks, shares, and a rank to train with.

Everything from the factors: an adapter of a model with billions of weights takes seconds. Definitions, with σ descending:
    energy of the first k     Σᵢ≤k σᵢ² / Σ σ²                        (the share of ‖ΔW‖²_F that rank k can hold)
    effective rank            exp(-Σ p log p), p = σ / Σσ             (Roy and Vetterli 2007)
    stable rank               Σ σ² / σ₁²
    share                     ‖ΔW‖²_F / Σ over all weights of ‖ΔW‖²_F
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.analysis.by_weight import ByWeight
from deltaw.analysis.directions import Directions, directions, place
from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import Base
from deltaw.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """One weight's ΔW. shape: (out, in). given: the rank it was trained with, if it is a low-rank method's."""

    shape: tuple[int, int]
    given: int | None
    values: tuple[float, ...]
    """Singular values, descending; those that are rounding noise are left out."""

    @property
    def rank(self) -> int:
        """Number of directions that are more than rounding noise."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return math.sqrt(self.squares)

    @property
    def squares(self) -> float:
        """‖ΔW‖²_F."""
        return math.fsum(v * v for v in self.values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ / Σσ: k equal singular values give k. 0 if nothing changes."""
        total = math.fsum(self.values)
        return math.exp(-math.fsum(v / total * math.log(v / total) for v in self.values)) if self.values else 0.0

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖²_F / σ₁². 0 if nothing changes."""
        return self.squares / self.values[0] ** 2 if self.values else 0.0

    def energy(self, k: int) -> float:
        """The share of ‖ΔW‖²_F in the first `k` directions."""
        return math.fsum(v * v for v in self.values[:k]) / self.squares if self.values else 1.0

    def rank_for(self, energy: float) -> int:
        """The fewest directions that hold the share `energy`."""
        return next((k for k in range(self.rank) if self.energy(k) >= energy), self.rank)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the spectra say about the rank. `text` says it in a sentence."""

    energy: float
    needed: int
    """The smallest rank that, used for every weight, holds the share `energy` of the whole change."""
    given: int | None
    """The largest rank that it was trained with."""
    suggested: int
    text: str


class Spectra(ByWeight[Spectrum]):
    """Parameter name -> `Spectrum`."""

    @property
    def norm(self) -> float:
        """‖ΔW‖_F over all weights together."""
        return math.sqrt(math.fsum(s.squares for s in self.weights.values()))

    def shares(self) -> dict[str, float]:
        """Parameter name -> its share of the whole change. They add up to 1 (to 0 if nothing changes)."""
        total = self.norm**2
        return {key: s.squares / total if total else 0.0 for key, s in self.weights.items()}

    def shares_by_layer(self) -> dict[int | None, float]:
        """Block number -> share; None for weights outside any numbered block."""
        return self._added(lambda p: p.layer)

    def shares_by_kind(self) -> dict[str, float]:
        """Place within a block ("attention.self.query") -> share."""
        return self._added(lambda p: p.kind)

    def _added(self, what: Any) -> dict[Any, float]:
        added: dict[Any, float] = {}
        for key, share in self.shares().items():
            name = what(place(key))
            added[name] = added.get(name, 0.0) + share
        return added

    def advice(self, energy: float = 0.95) -> Advice:
        """A rank to train with next time.

        One more than what holds `energy` of the change; twice the rank if the change fills the rank that it was given.
        """
        if not 0 < energy <= 1:
            raise ConfigError(f"energy={energy!r}: a share in (0, 1], for example 0.95")
        longest = max((s.rank for s in self.weights.values()), default=0)
        total = self.norm**2
        if not total:
            return Advice(energy=energy, needed=0, given=None, suggested=1, text="nothing was changed: no advice")
        held = [math.fsum(s.energy(k) * s.squares for s in self.weights.values()) / total for k in range(longest + 1)]
        needed = next((k for k in range(longest + 1) if held[k] >= energy * (1 - 1e-12)), longest)
        given = max((s.given for s in self.weights.values() if s.given is not None), default=None)
        said = f"energy {energy:.0%} at rank {needed}"
        if given is not None and needed >= given:
            suggested = 2 * given
            text = f"{said} of {given}: the change fills the rank that it was given; try {suggested}"
        else:
            suggested = needed + 1
            text = f"{said}: train with {suggested}" + (
                f" instead of {given}" if given not in (None, suggested) else ""
            )
        return Advice(energy=energy, needed=needed, given=given, suggested=suggested, text=text)

    def table(self) -> list[dict[str, Any]]:
        """One row per weight, for tables and JSON."""
        shares = self.shares()
        return [
            {
                "weight": key,
                "shape": list(s.shape),
                "trained_rank": s.given,
                "rank": s.rank,
                "effective_rank": s.effective_rank,
                "stable_rank": s.stable_rank,
                "rank_for_95": s.rank_for(0.95),
                "norm": s.norm,
                "share": shares[key],
                "singular_values": list(s.values),
            }
            for key, s in self.weights.items()
        ]

    def __str__(self) -> str:
        shares = self.shares()
        rows = {
            key: f"{s.rank:4d}  {s.effective_rank:9.2f}  {s.rank_for(0.95):7d}  {s.norm:7.3g}  {shares[key]:6.2%}"
            for key, s in self.weights.items()
        }
        return self.lines("rank  effective  95 % at     ‖ΔW‖   share", rows) + "\n" + self.advice().text


def spectrum(adapter: Adapter, base: Base | None = None) -> Spectra:
    """The singular values of every change in `adapter`.

    base: the base model or its parameters by name; needed for changes that depend on the base weight.

    Raises:
        ConfigError: a DoRA change (or the like), and no base.
        AdapterError: values that are not finite.
    """
    return spectra(*directions(adapter, base))


def spectra(found: Mapping[str, Directions], skipped: Mapping[str, str]) -> Spectra:
    """The singular values of directions that are known already."""
    return Spectra({name: _of(d) for name, d in found.items()}, skipped)


def _of(d: Directions) -> Spectrum:
    given = getattr(d.of.change.variant, "rank", None)
    return Spectrum(shape=d.shape, given=given, values=tuple(d.S.tolist()))
