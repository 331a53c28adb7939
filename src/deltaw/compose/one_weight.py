"""The changes that several adapters make to one weight -> the one change that stands for them, and its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.compose.cat import weighted_sum
from deltaw.compose.combiner import Combiner, Matrix, Term
from deltaw.compose.compress import compress, length, relative_error
from deltaw.core.adapter import Change
from deltaw.core.base_weights import Base, dense_base
from deltaw.core.true_change import check_finite, delta_of, is_copy, true_change
from deltaw.errors import AdapterError, ConfigError
from deltaw.ops.product import Product
from deltaw.variants.full import Full
from deltaw.variants.lora import LoRA


class Part(NamedTuple):
    """One adapter's change of the weight; `place` is the adapter's in the list."""

    weight: float
    change: Change
    place: int


class Blended(NamedTuple):
    """The result, its relative distance to the exact sum, and to what the combiner defines."""

    change: Change
    error: float
    truncation: float


@dataclass(frozen=True, kw_only=True)
class OneWeight:
    """How one weight's changes are blended; the options are `combine`'s."""

    how: Combiner
    rank: int | None
    energy: float | None
    seed: int
    base: Base | None

    def blend(self, key: str, parts: Sequence[Part]) -> Blended:
        """Blend the changes of the parameter `key`. All weights are different from zero."""
        shapes = {tuple(p.change.matrix_shape) for p in parts}
        if len(shapes) > 1:
            raise AdapterError(
                f"{key}: the adapters change matrices of different shapes, {' and '.join(map(str, sorted(shapes)))}; "
                f"they were not trained on the same base"
            )
        for part in parts:
            check_finite(key, part.change)
        if self.keeps(parts):
            return Blended(parts[0].change, 0.0, 0.0)
        for part in parts:
            _refuse_bias(key, part.change)
        return self.copies(key, parts) if any(is_copy(p.change) for p in parts) else self.low_rank(key, parts)

    def keeps(self, parts: Sequence[Part]) -> bool:
        """Whether the result is the one change there is, as it is."""
        if not self.how.keeps_one or len(parts) > 1 or parts[0].weight != 1.0:
            return False
        if is_copy(parts[0].change) or (self.rank is None and self.energy is None):
            return True
        narrow = getattr(parts[0].change.variant, "rank", None)
        return self.energy is None and self.rank is not None and narrow is not None and narrow <= self.rank

    def low_rank(self, key: str, parts: Sequence[Part]) -> Blended:
        """Changes of a matrix: the result is a LoRA."""
        terms = [Term(p.weight, self.change(key, p.change), p.place) for p in parts]
        blended = self.how.blend(key, terms, self.seed)
        product = compress(blended, rank=self.rank_to_keep(terms, blended), energy=self.energy, seed=self.seed)
        dtype = _result_dtype(parts)
        A, B = product.right.to(dtype).contiguous(), product.left.to(dtype).contiguous()
        change = Change(LoRA(rank=A.shape[0], alpha=A.shape[0]), {"A": A, "B": B}, _layer(parts), _shape(parts))
        return _with_errors(change, Product(B, A), blended, terms)

    def rank_to_keep(self, terms: Sequence[Term], blended: Matrix) -> int | None:
        """The rank to truncate to; None if nothing is to be cut."""
        if self.rank is not None or self.energy is not None:
            return self.rank
        widths = [t.change.width if isinstance(t.change, Product) else min(t.change.shape) for t in terms]
        if self.how.default_rank == "max":
            rank = max(widths)
        else:
            rank = sum(widths)
            if self.how.adds:
                return None
        if rank >= min(blended.shape) or (isinstance(blended, Product) and blended.width <= rank):
            return None
        return rank

    def copies(self, key: str, parts: Sequence[Part]) -> Blended:
        """Trained copies of a parameter (and low-rank changes of it): the result is a copy again."""
        dtype = _result_dtype(parts)
        first = next(p.change for p in parts if is_copy(p.change))
        add_up = sum(p.weight for p in parts)
        if self.base is not None:
            start = dense_base(self.base, key, first)
            terms = [Term(p.weight, self.change(key, p.change), p.place) for p in parts]
            terms = [Term(t.weight, t.dense(), t.index) for t in terms]
        elif self.how.adds and all(is_copy(p.change) for p in parts) and abs(add_up - 1) < 1e-12:
            # W + Σ wᵢ (Wᵢ - W) = Σ wᵢ Wᵢ: any W will do, so take zero.
            start = torch.zeros(
                first.matrix_shape, dtype=torch.float64, device=next(iter(first.tensors.values())).device
            )
            terms = [Term(p.weight, true_change(key, p.change, start), p.place) for p in parts]
        else:
            raise ConfigError(
                f"{key} is a trained copy in {len(parts)} of the adapters, and the weights add up to {add_up:g}: the "
                f"result depends on the base weight. Give `base=` (`--base`), or, with how='cat', weights that add up to 1"
            )
        blended = self.how.blend_copies(key, terms, self.seed)
        change_of_value = blended.dense() if isinstance(blended, Product) else blended
        value = start + change_of_value
        value = value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)
        change = Change(Full(), {"value": value}, _layer(parts), _shape(parts))
        return _with_errors(change, value.double() - start, change_of_value, terms)

    def change(self, key: str, change: Change) -> Matrix:
        """The true change, with the base weight only if it needs one."""
        if self.base is None:
            return true_change(key, change)
        try:
            return true_change(key, change)
        except ConfigError:
            return true_change(key, change, dense_base(self.base, key, change))


def _with_errors(change: Change, kept: Matrix, blended: Matrix, terms: Sequence[Term]) -> Blended:
    size = sum(abs(t.weight) * length(t.change) for t in terms)
    error = relative_error(kept, weighted_sum(terms), size)
    return Blended(change, error, relative_error(kept, blended, size))


def _result_dtype(parts: Sequence[Part]) -> torch.dtype:
    """At least float32: a sum of 16-bit factors rounded to 16 bits again would not be the sum."""
    tensors: list[Tensor] = [t for p in parts for t in p.change.tensors.values()]
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _layer(parts: Sequence[Part]) -> str | None:
    return next((p.change.layer for p in parts if p.change.layer is not None), None)


def _shape(parts: Sequence[Part]) -> tuple[int, ...] | None:
    return next((p.change.shape for p in parts if p.change.shape is not None), None)


def _refuse_bias(key: str, change: Change) -> None:
    """IA3's one tensor changes the bias too; a combination of weights alone would silently lose that half."""
    if is_copy(change):
        return
    probe = torch.ones(change.matrix_shape[0], device=next(iter(change.tensors.values())).device)
    with torch.no_grad():
        if delta_of(change).delta_bias(probe) is not None:
            raise ConfigError(
                f"{key}: {change.variant.kind} changes the layer's bias together with its weight, which a low-rank "
                f"result cannot hold; merge it into the model instead (dw.merge)"
            )
