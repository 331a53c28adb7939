"""Rows: chosen rows of a parameter trained as copies, the rest frozen (new tokens of an embedding; PEFT's trainable tokens).

W' has V in the rows `indices`, and W's own rows elsewhere. Rows are those of the stored parameter: the tokens of an
nn.Embedding, and of an output head, which is stored as (tokens, hidden).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.registry import variant
from deltaw.core.variant import Delta, FrozenMatrix, Site, Variant
from deltaw.errors import AdapterError, ConfigError, TargetError
from deltaw.variants.full import Full


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class Rows(Variant):
    """Trained copies of some rows.

    indices: which rows, each once, counted from 0.

    Raises:
        ConfigError: no index, a negative one, or one twice.
    """

    kind: ClassVar[str] = "rows"
    any_shape: ClassVar[bool] = True
    partial: ClassVar[bool] = True
    """An input may not reach the rows that change."""

    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        found = tuple(self.indices)
        object.__setattr__(self, "indices", found)
        if not found or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in found):
            raise ConfigError(f"indices={found!r}: name the rows to train, counted from 0, for example indices=(5, 7)")
        if len(set(found)) < len(found):
            twice = next(i for i in found if found.count(i) > 1)
            raise ConfigError(f"indices names row {twice} twice: each row has one value")

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return (cls(indices=(0,)),)

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        if site.buffer:
            return Full().create(site, shared)
        if not site.shape or (site.shape[0] >= 0 and max(self.indices) >= site.shape[0]):
            raise TargetError(f"{self}: this parameter is {site.shape}, it has no row {max(self.indices)}")
        return RowsDelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        value = tensors["value"]
        if value.ndim < 1 or value.shape[0] != len(self.indices):
            raise AdapterError(f"{self}: value must have {len(self.indices)} rows, found {tuple(value.shape)}")
        return (-1, *value.shape[1:])


class RowsDelta(Delta):
    """`value` (n, ...): the rows that stand in for those of W."""

    variant: Rows

    def __init__(self, variant: Rows, site: Site) -> None:
        super().__init__(variant, site)
        shape = (len(variant.indices), *site.shape[1:])
        self.value = nn.Parameter(torch.empty(shape, dtype=site.dtype, device=site.device))

    def where(self, device: torch.device) -> Tensor:
        """The rows' indices, (n,)."""
        return torch.tensor(self.variant.indices, dtype=torch.long, device=device)

    def start(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            weight = frozen.dense()
            self.value.copy_(weight[self.where(weight.device)])

    def delta_weight(self, weight: Tensor) -> Tensor:
        rows = self.where(weight.device)
        change = torch.zeros_like(weight, dtype=self.value.dtype)
        return change.index_copy(0, rows, self.value - weight[rows])

    def new_weight(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.where(weight.device), self.value.to(weight.dtype))
