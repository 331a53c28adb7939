"""The changes that several adapters make to one weight -> the one change that stands for them, and its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaw.compose.cat import weighted_sum
from deltaw.compose.combiner import Combiner, Term
from deltaw.compose.compress import compress, length, relative_error
from deltaw.core.adapter import Change, split_key
from deltaw.core.base_weights import Base, dense_base, has_weight
from deltaw.core.host import Host
from deltaw.core.registry import hosts
from deltaw.core.true_change import Matrix, check_finite, true_change, true_changes
from deltaw.errors import AdapterError, ConfigError
from deltaw.ops.product import Product
from deltaw.variants.diff import Diff
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
    averaged: bool = False
    """True for copies that were averaged although `how` does something else with changes."""


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
        _check_alike(key, parts)
        for part in parts:
            check_finite(key, part.change)
        if self.keeps(parts):
            return Blended(parts[0].change, 0.0, 0.0)
        for part in parts:
            _refuse_bias(key, part.change)
        if self.averages(key, parts):
            return self.averaged(parts)
        return self.dense(key, parts) if any(p.change.variant.any_shape for p in parts) else self.low_rank(key, parts)

    def keeps(self, parts: Sequence[Part]) -> bool:
        """Whether the result is the one change there is, as it is."""
        if not self.how.keeps_one or len(parts) > 1 or parts[0].weight != 1.0:
            return False
        if parts[0].change.variant.any_shape or (self.rank is None and self.energy is None):
            return True
        narrow = getattr(parts[0].change.variant, "rank", None)
        return self.energy is None and self.rank is not None and narrow is not None and narrow <= self.rank

    def low_rank(self, key: str, parts: Sequence[Part]) -> Blended:
        """Changes of a matrix, or of a stack of matrices: the result is a LoRA."""
        each = [self.changes(key, p.change) for p in parts]
        blends: list[Matrix] = []
        terms: list[list[Term]] = []
        for n, matrices in enumerate(zip(*each)):
            terms.append([Term(p.weight, matrix, p.place) for p, matrix in zip(parts, matrices)])
            blends.append(self.how.blend(key if len(each[0]) == 1 else f"{key}[{n}]", terms[n], self.seed))
        return self.as_lora(parts, blends, terms)

    def as_lora(self, parts: Sequence[Part], blends: Sequence[Matrix], terms: Sequence[Sequence[Term]]) -> Blended:
        """The blends, one per matrix, as the factors of one LoRA."""
        products: list[Product] = []
        for each, blended in zip(terms, blends):
            rank = self.rank_to_keep(each, blended)
            products.append(compress(blended, rank=rank, energy=self.energy, seed=self.seed))
        dtype = _result_dtype(parts)
        width = max(p.width for p in products)
        A = torch.stack([pad(p.right.to(dtype), (0, 0, 0, width - p.width)) for p in products])
        B = torch.stack([pad(p.left.to(dtype), (0, width - p.width)) for p in products])
        kept = [Product(b, a) for a, b in zip(A, B)]
        if len(_shape(parts)) == 2:
            A, B = A[0], B[0]
        change = replace(
            _facts(parts), variant=LoRA(rank=width, alpha=width), tensors={"A": A.contiguous(), "B": B.contiguous()}
        )
        return _with_errors(change, kept, blends, terms)

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

    def averages(self, key: str, parts: Sequence[Part]) -> bool:
        """Whether all are copies of the same entries with weights that add up to 1, so that any W gives the same sum.

        Copies of a parameter that the base does not have (a new head) are averaged in any case: with no W there is no
        change that could be pruned or turned.
        """
        first = parts[0].change
        alike = first.variant.any_shape and all(p.change.variant == first.variant for p in parts)
        if not alike or abs(sum(p.weight for p in parts) - 1) > 1e-12:
            return False
        if self.how.adds:
            return True
        try:
            true_change(key, first)
        except ConfigError:
            return self.base is None or not has_weight(self.base, key)
        return False

    def averaged(self, parts: Sequence[Part]) -> Blended:
        """W + Σ wᵢ (Wᵢ - W) = Σ wᵢ Wᵢ, without W. The errors are relative to the values, for the change is not known."""
        dtype = _result_dtype(parts)
        tensors: dict[str, Tensor] = {}
        blends: list[Matrix] = []
        kept: list[Matrix] = []
        terms: list[list[Term]] = []
        for name in parts[0].change.tensors:
            terms.append([Term(p.weight, p.change.tensors[name].double(), p.place) for p in parts])
            blends.append(weighted_sum(terms[-1]))
            tensors[name] = _rounded(terms[-1], dtype)
            kept.append(tensors[name].double())
        change = replace(_facts(parts), variant=parts[0].change.variant, tensors=tensors)
        return _with_errors(change, kept, blends, terms)._replace(averaged=not self.how.adds)

    def dense(self, key: str, parts: Sequence[Part]) -> Blended:
        """Changes of a parameter of any shape (and low-rank ones of the same): the result is dense too.

        A dense difference if all changes are known without the base weight, else a trained copy. But a LoRA, where a
        rank or energy is asked for and a low-rank part shows that the layer takes one.
        """
        dtype = _result_dtype(parts)
        try:
            terms = [Term(p.weight, true_change(key, p.change), p.place) for p in parts]
            start = None
        except ConfigError:
            if self.base is None:
                add_up = sum(p.weight for p in parts)
                raise ConfigError(
                    f"{key} is a trained copy in some of the adapters, and the weights add up to {add_up:g}: the result "
                    f"depends on the base weight. Give `base=` (`--base`), or weights that add up to 1"
                ) from None
            first = next(p.change for p in parts if p.change.variant.any_shape)
            if not has_weight(self.base, key):
                raise ConfigError(
                    f"the base has no {key} (a new head?), so its copies can only be averaged: give it weights that add "
                    f'up to 1, for two adapters \'{{"{split_key(key)[0]}": [0.5, 0.5], "*": [1, 1]}}\''
                ) from None
            start = dense_base(self.base, key, first)
            terms = [Term(p.weight, true_change(key, p.change, start), p.place) for p in parts]
        terms = [Term(t.weight, t.dense(), t.place) for t in terms]
        mixed = len({p.change.variant.any_shape for p in parts}) > 1
        if len({tuple(t.change.shape) for t in terms}) > 1 or (mixed and stored_otherwise(parts)):
            raise ConfigError(
                f"{key}: a low-rank change and a trained copy of a weight that is not stored as an (out, in) matrix "
                f"cannot be added up; merge them into a model (dw.merge) and extract the difference instead"
            )
        blended = self.how.blend_any_shape(key, terms, self.seed)
        blended = blended.dense() if isinstance(blended, Product) else blended
        truncated = self.rank is not None or self.energy is not None
        if truncated and blended.ndim == 2 and not all(p.change.variant.any_shape for p in parts):
            return self.as_lora(parts, [blended], [terms])
        if start is None:
            value = blended.to(dtype)
            change = replace(_facts(parts), variant=Diff(), tensors={"diff": value})
            return _with_errors(change, [value.double()], [blended], [terms])
        value = start + blended
        value = value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)
        change = replace(_facts(parts), variant=Full(), tensors={"value": value})
        return _with_errors(change, [value.double() - start], [blended], [terms])

    def changes(self, key: str, change: Change) -> list[Matrix]:
        """The true changes, with the base weight only if they need one."""
        try:
            return true_changes(key, change)
        except ConfigError:
            if self.base is None:
                raise
            return true_changes(key, change, dense_base(self.base, key, change))


def stored_otherwise(parts: Sequence[Part]) -> bool:
    """Whether the weight's layer may store it in another form than its (out, in) matrix, which a square one does not show."""
    family = _facts(parts).layer
    if family is None or family not in hosts:
        return False
    host = hosts[family]
    return host.to_matrix is not Host.to_matrix and not (host.full_only and len(_shape(parts)) == 2)


def _with_errors(
    change: Change, kept: Sequence[Matrix], blends: Sequence[Matrix], terms: Sequence[Sequence[Term]]
) -> Blended:
    """`change` with its distances to the exact sums and to the blends, over all matrices of a stack together."""
    size = sum(abs(t.weight) * length(t.change) for each in terms for t in each)
    sums = [weighted_sum(each) for each in terms]
    return Blended(change, relative_error(kept, sums, size), relative_error(kept, blends, size))


def _rounded(terms: Sequence[Term], dtype: torch.dtype) -> Tensor:
    """The weighted sum in `dtype`; whole numbers (a counter) are rounded to whole numbers."""
    exact = weighted_sum(terms)
    assert isinstance(exact, Tensor)
    return exact.to(dtype) if dtype.is_floating_point else exact.round().to(dtype)


def _result_dtype(parts: Sequence[Part]) -> torch.dtype:
    """At least float32: a sum of 16-bit factors rounded to 16 bits again would not be the sum."""
    tensors: list[Tensor] = [t for p in parts for t in p.change.tensors.values()]
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _facts(parts: Sequence[Part]) -> Change:
    """A change with what is known of the weight itself: layer family, stored shape, ties."""
    layer = next((p.change.layer for p in parts if p.change.layer is not None), None)
    shape = next((p.change.shape for p in parts if p.change.shape is not None), None)
    return replace(parts[0].change, layer=layer, shape=shape)


def _shape(parts: Sequence[Part]) -> tuple[int, ...]:
    return tuple(parts[0].change.matrix_shape)


def _check_alike(key: str, parts: Sequence[Part]) -> None:
    """Refuse changes of weights that cannot be the same one."""
    first = parts[0].change
    for part in parts[1:]:
        one, other = tuple(first.matrix_shape), tuple(part.change.matrix_shape)
        if len(one) != len(other) or any(a != b and -1 not in (a, b) for a, b in zip(one, other)):
            raise AdapterError(
                f"{key}: the adapters change weights of different shapes, {one} and {other}; they were not trained on "
                f"the same base"
            )
        if set(first.tied) != set(part.change.tied):
            raise AdapterError(
                f"{key}: one adapter changes it together with {first.tied or 'nothing else'}, the other with "
                f"{part.change.tied or 'nothing else'}: a sum of the two has no meaning for the tied weights"
            )


def _refuse_bias(key: str, change: Change) -> None:
    """IA3's one tensor changes the bias too; a combination of weights alone would silently lose that half."""
    if not change.variant.any_shape and change.delta().changes_bias:
        raise ConfigError(
            f"{key}: {change.variant.kind} changes the layer's bias together with its weight, which a low-rank result "
            f"cannot hold; merge it into the model instead (dw.merge)"
        )
