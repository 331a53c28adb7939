"""The singular directions of every change of an adapter, from its factors, and where each weight sits in the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change, check_adapter, split_key
from deltaw.core.base_weights import Base, dense_base, has_weight
from deltaw.core.true_change import Matrix, true_changes
from deltaw.errors import ConfigError
from deltaw.ops.product import Product

RESOLUTION = 1e-7
"""Singular values below this share of the largest are rounding of fp32 factors, and their directions mean nothing."""
ROUNDING = 1e-13
"""What cancels in a product of two factors leaves a rest of up to so much of their norms' product: A - A is no change."""


class Directions(NamedTuple):
    """ΔW = U diag(S) Vh of one matrix, without the directions that are rounding noise.

    `U` (out, k) and `Vh` (k, in) orthonormal, `S` (k,) descending, in float64. k is 0 where nothing changes.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    of: Matter

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.U.shape[0], self.Vh.shape[1]

    def side(self, side: str) -> Tensor:
        """Orthonormal columns (d, k): the input directions ("in", right singular) or the output ones ("out", left)."""
        if side not in ("in", "out"):
            raise ConfigError(f"side={side!r}: 'in' (the inputs that ΔW reads) or 'out' (the outputs that it writes)")
        return self.Vh.T if side == "in" else self.U


class Matter(NamedTuple):
    """Which change a matrix is of: the parameter's name, its change, and the place in a stack of expert weights."""

    key: str
    change: Change
    expert: int | None = None

    @property
    def name(self) -> str:
        """The parameter's name, with "#3" for the fourth expert of a stack."""
        return self.key if self.expert is None else f"{self.key}#{self.expert}"

    def base(self, base: Base) -> Tensor:
        """The base weight behind it, (out, in), in float64."""
        weight = dense_base(base, self.key, self.change)
        return weight if self.expert is None else weight[self.expert]


Found = tuple[dict[str, Directions], dict[str, str]]
"""Name -> directions, and name -> why it is left out."""


def directions(adapter: Adapter, base: Base | None = None) -> Found:
    """Name -> `Directions` of every changed matrix; and name -> why it is left out.

    Left out: vectors (a bias has no directions), and trained copies if no base is given (their ΔW is not known).

    Raises:
        ConfigError: another change depends on the base weight (DoRA), and none was given.
    """
    skipped: dict[str, str] = {}
    found: dict[str, Directions] = {}
    for matter, matrix in matrices(adapter, base, skipped):
        parts = matrix.svd() if isinstance(matrix, Product) else torch.linalg.svd(matrix, full_matrices=False)
        lost = 0.0
        if isinstance(matrix, Product):
            lost = ROUNDING * abs(matrix.scale) * float(matrix.left.double().norm() * matrix.right.double().norm())
        found[matter.name] = without_noise(parts[0], parts[1], parts[2], matter, lost)
    return found, skipped


def matrices(adapter: Adapter, base: Base | None, skipped: dict[str, str]) -> Iterator[tuple[Matter, Matrix]]:
    """Every changed matrix with its true change, one at a time; what has none is added to `skipped`."""
    check_adapter(adapter, "the analysis")
    for key, change in adapter.changes.items():
        try:
            found = true_changes(key, change)
        except ConfigError:
            if base is None and change.variant.any_shape:
                skipped[key] = "a trained copy: its change is known only beside the base weight (give base)"
                continue
            if base is None:
                raise
            if change.variant.any_shape and not has_weight(base, key):
                skipped[key] = (
                    "a trained copy of a parameter that the base does not have (a new head): nothing to compare"
                )
                continue
            found = true_changes(key, change, dense_base(base, key, change))
        if len(found[0].shape) != 2:
            skipped[key] = f"of shape {tuple(found[0].shape)}: only matrices have singular directions"
            continue
        stacked = len(change.matrix_shape) > 2
        for n, matrix in enumerate(found):
            yield Matter(key, change, n if stacked else None), matrix


def without_noise(U: Tensor, S: Tensor, Vh: Tensor, of: Matter, lost: float = 0.0) -> Directions:
    """The decomposition without what is below `RESOLUTION` of the largest singular value, or not above `lost`."""
    keep = int(((RESOLUTION * S[:1] < S) & (lost < S)).sum())
    return Directions(U[:, :keep], S[:keep], Vh[:keep], of)


def without_unchanged(found: dict[str, Directions], skipped: dict[str, str]) -> Found:
    """The matrices that do change, and `skipped` with those that do not."""
    changed = {name: d for name, d in found.items() if d.S.numel()}
    return changed, {**skipped, **{name: "is not changed at all" for name in found if name not in changed}}


class Place(NamedTuple):
    """Where a weight sits: the number of its block, if it has one, and what it is within every block."""

    layer: int | None
    kind: str


def place(key: str) -> Place:
    """ "model.layers.3.self_attn.q_proj.weight" -> Place(3, "self_attn.q_proj"): the first number is the block's."""
    path, site = split_key(key)
    parts = path.split(".")
    if site != "weight":
        parts.append(site)
    for at, part in enumerate(parts):
        if part.isdigit():
            return Place(int(part), ".".join(parts[at + 1 :]) or ".".join(parts[:at]) or site)
    return Place(None, ".".join(parts))


def by_place(keys: list[str]) -> tuple[list[int | None], list[str], dict[Place, list[str]]]:
    """Blocks in order, kinds in order of appearance, and the parameters at each place (for tables and heat maps)."""
    places: dict[Place, list[str]] = {}
    for key in keys:
        places.setdefault(place(key), []).append(key)
    layers = sorted({p.layer for p in places}, key=lambda n: (n is None, n or 0))
    return layers, list(dict.fromkeys(p.kind for p in places)), places
