"""What a model gave for the groups of a batch, each run alone, put together again for `dw.rows`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.errors import ModelError
from deltaw.model import trees


class Joined(NamedTuple):
    """How the outputs of groups become those of the batch.

    groups: the rows of each. dims: the dimension that counts the rows in each output of which that is known (None: it counts
    none). usual: where to look first in the others. scalars: "refuse" or "mean", for numbers that describe a whole group.
    """

    groups: Sequence[Sequence[int]]
    dims: Mapping[str, int | None]
    usual: int
    scalars: str

    def output(self, name: str, pieces: Sequence[Any]) -> Any:
        """One output of the model from those of the groups."""
        first = pieces[0]
        label = f"output {name!r}" if name else "the output"
        if not isinstance(first, Tensor):
            if any(type(p) is not type(first) or p != first for p in pieces):
                raise ModelError(
                    f"dw.rows: {label}, a {type(first).__name__}, differs between the groups of the batch and is no tensor, so "
                    "it cannot be put together: leave it out (use_cache=False), or vouch for the layers with how='one pass'"
                )
            return first
        sizes = list(map(len, self.groups))
        if first.ndim == 0 or self.dims.get(name, 0) is None:
            return self.join_shared(label, pieces, sizes)
        dim = self.dims.get(name)
        if dim is None:
            dim = self.guessed_dim(label, pieces, sizes)
        multiple = first.shape[dim] // sizes[0]
        if any(p.shape[dim] != multiple * size for p, size in zip(pieces, sizes)):
            raise ModelError(
                f"dw.rows: {label} has shapes {[tuple(p.shape) for p in pieces]} for groups of {sizes} rows: "
                "they cannot be put together"
            )
        return trees.place(pieces, [trees.unfold(group, multiple) for group in self.groups], dim)

    def join_shared(self, label: str, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """An output that does not count rows: a number for the batch, or a tensor that all rows share."""
        if all(torch.equal(p, pieces[0]) for p in pieces[1:]):
            return pieces[0]
        if self.scalars == "mean" and pieces[0].is_floating_point():
            return sum((p * (size / sum(sizes)) for p, size in zip(pieces, sizes)), torch.zeros_like(pieces[0]))
        raise ModelError(
            f"dw.rows: {label}, {tuple(pieces[0].shape)}, speaks for the whole batch, and the batch ran in {len(sizes)} "
            "groups of adapters: compute it from the rows' outputs outside of the model, or, if it is a mean over rows, "
            "pass scalars='mean'"
        )

    def guessed_dim(self, label: str, pieces: Sequence[Tensor], sizes: Sequence[int]) -> int:
        """The dimension of an output that counts the rows, from its shapes alone."""
        fits = [
            d
            for d in range(pieces[0].ndim)
            if all(p.shape[d] * sizes[0] == pieces[0].shape[d] * s for p, s in zip(pieces, sizes))
            and pieces[0].shape[d] % sizes[0] == 0
            and pieces[0].shape[d] > 0
        ]
        exact = [d for d in fits if pieces[0].shape[d] == sizes[0]]
        for options in ([self.usual] if self.usual in exact else [], exact, [self.usual] if self.usual in fits else []):
            if len(options) == 1:
                return options[0]
        raise ModelError(
            f"dw.rows: {label} has shapes {[tuple(p.shape) for p in pieces]} for groups of {sizes} rows: "
            "which dimension counts the rows cannot be told"
        )
