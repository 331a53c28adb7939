"""LoKr: ΔW = scale · C ⊗ D, a Kronecker product of a small and a large matrix (LyCORIS, arXiv:2309.14859).

C is (a, c), D is (b, d) with out = a·b and in = c·d; each is kept whole or, where that is smaller, as a product of two
factors of the rank. Row i·b + k, column j·d + l of ΔW is scale · C[i, j] · D[k, l].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import inits, variant
from deltaw.core.variant import Delta, FrozenMatrix, Site, Variant
from deltaw.errors import AdapterError, ConfigError, TargetError
from deltaw.variants.loha import dropped_rows

WHOLE = ("CD", "C", "D", "")


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class LoKr(Variant):
    """Low-rank Kronecker adaptation, ΔW = alpha/rank · C ⊗ D.

    rank: of the factors of D (and of C), where they are factored. alpha: numerator of the scale; None means 2 x rank.
    factor: the size wanted for C's sides; -1 divides each side of W as evenly as it goes.
    decompose_both: factor C too, where its sides are more than twice the rank.
    split: C's shape (a, c) itself, instead of what `factor` gives (files of other libraries).
    whole: which of C and D are kept whole, "CD", "C", "D" or "", instead of the rule by size.
    rank_dropout: probability of leaving out, in one training call, each of the rows of ΔW (the others grow by 1/(1-p)).
    module_dropout: probability of leaving out the whole change in one training call (nothing grows).

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "lokr"

    rank: int = 8
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    split: tuple[int, int] | None = None
    whole: str | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        options.positive_int("rank", self.rank)
        if self.alpha is not None:
            options.positive("alpha", self.alpha)
        if self.factor != -1:
            options.positive_int("factor", self.factor)
        options.boolean("decompose_both", self.decompose_both)
        if self.split is not None:
            object.__setattr__(self, "split", tuple(self.split))  # a list, where it comes from a file
            for side in self.split:
                options.positive_int("split", side)
        if self.whole is not None:
            options.one_of("whole", self.whole, WHOLE)
        options.probability("rank_dropout", self.rank_dropout)
        options.probability("module_dropout", self.module_dropout)
        options.boolean("bias", self.bias)

    @property
    def scale(self) -> float:
        """The factor in front of C ⊗ D."""
        return 2.0 if self.alpha is None else float(self.alpha) / self.rank

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return (
            cls(rank=2, alpha=3),
            cls(rank=1, decompose_both=True, bias=True),
            cls(rank=64, factor=2, rank_dropout=0.5, module_dropout=0.5),
        )

    def sides(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """((a, b), (c, d)) for a weight (out, in) = (a·b, c·d).

        Raises:
            TargetError: the weight is no matrix. ConfigError: `split` does not divide it.
        """
        if len(shape) != 2:
            raise TargetError(f"{self} changes matrices; this weight is a stack {shape}: use dw.LoRA for it")
        if self.split is None:
            return divided(shape[0], self.factor), divided(shape[1], self.factor)
        (out, columns), (a, c) = shape, self.split
        if out % a or columns % c:
            raise ConfigError(f"{self}: split={self.split} does not divide a weight {shape}")
        return (a, out // a), (c, columns // c)

    def kept_whole(self, a: int, b: int, c: int, d: int) -> str:
        """Which of C (a, c) and D (b, d) are kept whole."""
        if self.whole is not None:
            return self.whole
        return ("" if self.decompose_both and self.rank < max(a, c) / 2 else "C") + (
            "" if self.rank < max(b, d) / 2 else "D"
        )

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return LoKrDelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        (a, c), (b, d) = self._side(tensors, "C"), self._side(tensors, "D")
        shape = (a * b, c * d)
        if self.split is None and self.sides(shape) != ((a, b), (c, d)):
            raise AdapterError(
                f"{self}: C is {(a, c)} and D {(b, d)}, which is not how it divides {shape}: give split="
            )
        return shape

    def _side(self, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
        if name in tensors:
            rows, columns = tensors[name].shape
            return rows, columns
        left, right = tensors[f"{name}_left"], tensors[f"{name}_right"]
        if left.shape[1] != self.rank or right.shape[0] != self.rank:
            raise AdapterError(
                f"{self}: {name} must be (rows, {self.rank}) times ({self.rank}, columns), "
                f"found {tuple(left.shape)} and {tuple(right.shape)}"
            )
        return left.shape[0], right.shape[1]


class LoKrDelta(Delta):
    """C (a, c) and D (b, d), each whole or as `_left` (rows, rank) and `_right` (rank, columns). C starts at zero."""

    variant: LoKr

    def __init__(self, variant: LoKr, site: Site) -> None:
        super().__init__(variant, site)
        (a, b), (c, d) = variant.sides(site.shape)
        whole = variant.kept_whole(a, b, c, d)
        for name, (rows, columns) in {"C": (a, c), "D": (b, d)}.items():
            shapes = {name: (rows, columns)}
            if name not in whole:
                shapes = {f"{name}_left": (rows, variant.rank), f"{name}_right": (variant.rank, columns)}
            for key, shape in shapes.items():
                self.register_parameter(key, nn.Parameter(torch.empty(shape, dtype=site.dtype, device=site.device)))

    def start(self, frozen: FrozenMatrix) -> None:
        zero = self._parameters.get("C", self._parameters.get("C_left"))
        for parameter in self.parameters():
            if parameter is not zero:
                inits["kaiming"](parameter, zero)  # fills the first, zeroes the second

    def side(self, name: str) -> Tensor:
        """C or D, multiplied out."""
        found = self._parameters.get(name)
        if found is not None:
            return found
        product: Tensor = getattr(self, f"{name}_left") @ getattr(self, f"{name}_right")
        return product

    def delta_weight(self, weight: Tensor) -> Tensor:
        v = self.variant
        change = torch.kron(v.scale * self.side("C"), self.side("D").contiguous())
        return dropped_rows(change, v.rank_dropout, v.module_dropout) if self.training else change


def divided(size: int, factor: int = -1) -> tuple[int, int]:
    """`size` as a product (small, large): by `factor` if it divides it, else the most even way with small <= factor.

    divided(256) is (16, 16), divided(128) is (8, 16), divided(127) is (1, 127), divided(128, 4) is (4, 32).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(n for n in range(1, int(size**0.5) + 1) if size % n == 0 and n <= limit)
    return small, size // small
