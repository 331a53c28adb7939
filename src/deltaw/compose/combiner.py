"""What a combiner is: a value that blends several changes of one weight into one.

A combiner sees one weight at a time: `terms`, the changes that the adapters make to it, each with its weight. It
returns the blend as a `Product` (exact factors) or as a dense matrix; `combine` compresses that to LoRA factors and
states the error. One file per combiner; the file registers itself and nobody keeps a list.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from deltaw.core.registry import Registry
from deltaw.core.true_change import Matrix
from deltaw.errors import ConfigError
from deltaw.ops.product import Product


@dataclass(frozen=True)
class Term:
    """One adapter's change of one weight. `place` is the adapter's in the list that `combine` was given."""

    weight: float
    change: Matrix
    place: int

    def dense(self) -> Tensor:
        """ΔW without the weight, (out, in), in float64."""
        return self.change.dense() if isinstance(self.change, Product) else self.change


@dataclass(frozen=True, kw_only=True)
class Combiner(ABC):
    """A way to blend changes. Options and identity: printing one prints the call that makes it."""

    kind: ClassVar[str]
    """The name for `how=` and the command line."""
    default_rank: ClassVar[str] = "sum"
    """The rank kept if none is asked for: the "sum" of the parts' ranks, or their "max"."""
    keeps_one: ClassVar[bool] = False
    """True if a single change of weight 1 comes back as it is."""
    adds: ClassVar[bool] = False
    """True if the blend is Σ wᵢ ΔWᵢ. Copies whose weights add up to 1 then need no base weight."""

    @abstractmethod
    def blend(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        """The blended change of the weight `key`. `terms` is not empty, and all are of one (out, in) shape."""

    def blend_any_shape(self, key: str, terms: Sequence[Term], seed: int) -> Matrix:
        """The same for dense changes of a parameter of any shape, which is kept dense. Default: `blend`."""
        return self.blend(key, terms, seed)

    def __repr__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


combiners: Registry[type[Any]] = Registry("way to combine", "deltaw.compose")

C = TypeVar("C", bound=type[Any])


def combiner(cls: C) -> C:
    """Class decorator: make a Combiner known by its `kind`."""
    combiners.register(cls.kind, cls)
    return cls


def check_density(density: float) -> None:
    """Refuse a density outside (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density={density!r}: the share of entries to keep, in (0, 1], for example density=0.2")


def keep_largest(dense: Tensor, density: float) -> Tensor:
    """`dense` with all but the largest `density` share of its entries (by absolute value) set to zero.

    At least one entry is kept, the count is rounded to the nearest, and ties at the threshold go to the first entries.
    """
    count = max(1, round(density * dense.numel()))
    if count >= dense.numel():
        return dense
    sizes = dense.abs().flatten()
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    above, equal = sizes > threshold, sizes == threshold
    kept = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return torch.where(kept.view_as(dense), dense, 0.0)


def draw_mask(shape: torch.Size, density: float, *, seed: int, key: str, place: int) -> Tensor:
    """A boolean mask that is True with probability `density`; depends on seed, weight and adapter only, not on order."""
    drawn_from = (seed * 1_000_003 + place) * 4_294_967_291 + zlib.crc32(key.encode())
    generator = torch.Generator().manual_seed(drawn_from % (1 << 64))  # as wide as it takes
    return torch.rand(shape, generator=generator, dtype=torch.float32) < density
