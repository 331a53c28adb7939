"""VeRA: ΔW = diag(b) B diag(d) A, with A and B random, frozen and shared, b and d trained (Kopiczko et al. 2023, arXiv:2310.11454).

A (rank, in) and B (out, rank) come from `seed`; layers of one width share one piece of memory. Up to their Kaiming bound
a narrower layer's A has the first columns of a wider one's (its B the first rows). Files keep A and B all the same: no
generator promises the same numbers for ever, and other libraries draw theirs otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import variant
from deltaw.core.variant import Delta, FrozenMatrix, LowRank, Site, Variant
from deltaw.errors import AdapterError, ConfigError


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class VeRA(Variant):
    """Vector-based random matrix adaptation, ΔW = diag(b) B diag(d) A.

    rank: number of random directions; cheap, so larger than LoRA's.
    seed: from which A and B are drawn.
    d: where the trained d (rank,) starts; b (out,) starts at zero.
    dropout: probability of zeroing, in training, an entry of A's input.

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "vera"

    rank: int = 256
    seed: int = 0
    d: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        options.positive_int("rank", self.rank)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**62:
            raise ConfigError(f"seed={self.seed!r}: must be a whole number from 0 on, for example seed=0")
        options.positive("d", self.d, 0.1)
        options.probability("dropout", self.dropout)
        options.boolean("bias", self.bias)

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return cls(rank=5), cls(rank=17, seed=3, d=1.0, dropout=0.5, bias=True)

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return VeRADelta(self, site, shared)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        A, B, b, d = (tensors[n] for n in ("A", "B", "b", "d"))
        if A.ndim != 2 or B.ndim != 2 or not (A.shape[0] == B.shape[1] == d.shape[-1] == self.rank):
            raise AdapterError(
                f"{self}: A must be ({self.rank}, in), B (out, {self.rank}) and d ({self.rank},), found "
                f"{tuple(A.shape)}, {tuple(B.shape)} and {tuple(d.shape)}"
            )
        if b.shape != (*d.shape[:-1], B.shape[0]):
            raise AdapterError(f"{self}: b must be ({B.shape[0]},), found {tuple(b.shape)}")
        return (*b.shape, A.shape[1])


class VeRADelta(Delta):
    """b (out,) and d (rank,) are trained; A (rank, in) and B (out, rank) are frozen and shared."""

    fast = ("b",)
    variant: VeRA
    A: Tensor
    B: Tensor

    def __init__(self, variant: VeRA, site: Site, shared: dict[str, Any]) -> None:
        super().__init__(variant, site)
        *stack, out, columns = site.shape
        self.b = nn.Parameter(torch.empty(*stack, out, dtype=site.dtype, device=site.device))
        self.d = nn.Parameter(torch.empty(*stack, variant.rank, dtype=site.dtype, device=site.device))
        self.register_buffer("A", projection(shared, variant, 0, columns, site))
        self.register_buffer("B", projection(shared, variant, 1, out, site))
        self.shared: dict[str, Any] | None = shared

    def start(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            self.b.zero_()
            self.d.fill_(self.variant.d)

    def prepare(self, frozen: FrozenMatrix) -> None:
        """After loading, layers whose A or B are equal share them again."""
        if self.shared is not None:
            for name in ("A", "B"):
                own = getattr(self, name)
                known = self.shared.setdefault(f"vera {name} {tuple(own.shape)} {own.dtype} {own.device}", own)
                if known is not own and torch.equal(known, own):
                    setattr(self, name, known)
            self.shared = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(d) A, (rank, in), and diag(b) B, (out, rank)."""
        return self.d[..., None] * self.A, self.b[..., None] * self.B

    def delta_weight(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        return B @ A

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...] | None:
        A, B = self.factors()
        return (LowRank(A, B, 1.0, None, self.variant.dropout),)


def projection(shared: dict[str, Any], variant: VeRA, which: int, size: int, site: Site) -> Tensor:
    """A (rank, size) for `which` = 0, B (size, rank) for 1, from `variant.seed`; one tensor for all layers of that size.

    Uniform with variance 2/fan_in, as PEFT's: the fan is `size` for A, the rank for B.
    """
    key = f"vera {variant.rank} {variant.seed} {which} {size} {site.dtype} {site.device}"
    if key not in shared:
        rows = torch.empty(size, variant.rank, device="meta")
        if site.device.type != "meta":
            generator = torch.Generator().manual_seed(2 * variant.seed + which)
            bound = math.sqrt(6 / (variant.rank if which else size))
            rows = bound * (torch.rand(size, variant.rank, generator=generator, device="cpu") * 2 - 1)
        shared[key] = (rows if which else rows.T).to(site.device, site.dtype).contiguous()
    found: Tensor = shared[key]
    return found
