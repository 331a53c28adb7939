"""The frozen prefix, computed once per example: what lies below every trained weight is a constant of the example.

Before the first step the model runs once over each split, in index order, and the outputs of the modules that
`prefix_search` found are written to a file; from then on these modules answer from it and compute nothing. Exact up to
rounding. Unusual: no model has to say where it can be cut, and of the modules below the cut only those outputs are kept
that something above still reads; the others return zeros of the right shape, which nobody looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.training.prefix_file import PrefixFile


class NotConstant(Exception):
    """The prefix cannot be recorded; the text says why, as the end of "the frozen prefix is computed in every epoch: "."""


class Tree(NamedTuple):
    """The tensors of a module's output, and how to put others in their places."""

    leaves: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]


def flat(output: Any) -> Tree | None:
    """A tensor, or tuples, lists and mappings of tensors and None, taken apart; None for anything else."""
    if isinstance(output, Tensor):
        return Tree([output], lambda new: new[0])
    if output is None:
        return Tree([], lambda _: None)
    make: Callable[[Any], Any]
    if type(output) in (tuple, list):
        parts, make = [flat(v) for v in output], type(output)
    elif isinstance(output, dict):
        parts, make = [flat(v) for v in output.values()], _mapping_of(list(output), type(output))
    else:
        return None
    if any(part is None for part in parts):
        return None
    whole = [part for part in parts if part is not None]
    sizes = [len(part.leaves) for part in whole]

    def rebuild(new: Sequence[Tensor]) -> Any:
        rest = iter(new)
        return make([part.rebuild([next(rest) for _ in range(size)]) for part, size in zip(whole, sizes)])

    return Tree([leaf for part in whole for leaf in part.leaves], rebuild)


def _mapping_of(keys: Sequence[Any], kind: type[Any]) -> Callable[[Any], Any]:
    def make(values: Any) -> Any:
        pairs = dict(zip(keys, values))
        return pairs if kind is dict else kind(**pairs)

    return make


@dataclass(frozen=True)
class Leaf:
    """One tensor that a module of the prefix returns.

    fold: entries of the first dimension per example (detectors folded into the batch: 3). shape: of one entry; with
    `long`, its first size is the example's length. use: "all", "first" (position 0 only), or "none" (nobody reads it).
    """

    fold: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    long: bool
    use: str = "all"

    def row_shape(self, length: int) -> tuple[int, ...]:
        """(fold, *shape) of an example of that length, as it is kept."""
        if self.use == "first":
            return (self.fold, 1, *self.shape[1:])
        return (self.fold, *((length, *self.shape[1:]) if self.long else self.shape))


@dataclass(frozen=True)
class Cut:
    """One module whose outputs are recorded. `rebuild`: its tensors -> what it returns."""

    name: str
    module: nn.Module
    leaves: tuple[Leaf, ...]
    rebuild: Callable[[Sequence[Tensor]], Any]


class Row(NamedTuple):
    """Where the kept outputs of one example lie in the file, and the example's length (0 where there is none)."""

    offset: int
    length: int


class Prefix:
    """Records the outputs of `cuts`, and plays them back. `answer(batch)` runs the whole model on a batch."""

    def __init__(self, cuts: Sequence[Cut], answer: Callable[[Any], Any], file: PrefixFile) -> None:
        self.cuts, self.answer, self.file = tuple(cuts), answer, file

    def row_bytes(self, length: int) -> int:
        """Size of one example of that length in the file."""
        return sum(
            torch.Size(leaf.row_shape(length)).numel() * leaf.dtype.itemsize
            for cut in self.cuts
            for leaf in cut.leaves
            if leaf.use != "none"
        )

    @torch.no_grad()
    def record(self, batch: Any, lengths: Sequence[int] | None) -> list[Row]:
        """Run the model on a batch and write down the outputs of each example; where each lies.

        Raises:
            NotConstant: an output has another shape than the probe had.
        """
        found: dict[str, list[Tensor]] = {}

        def keep(cut: Cut) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                tree = flat(output)
                # copied at once: a later module may write into it
                found[cut.name] = [] if tree is None else [leaf.detach().to("cpu", copy=True) for leaf in tree.leaves]

            return hook

        handles = [cut.module.register_forward_hook(keep(cut)) for cut in self.cuts]
        try:
            self.answer(batch)
        finally:
            for handle in handles:
                handle.remove()
        first = self.cuts[0]
        count = len(found[first.name][0]) // first.leaves[0].fold
        rows = []
        for i in range(count):
            length = 0 if lengths is None else int(lengths[i])
            parts = []
            for cut in self.cuts:
                for leaf, tensor in zip(cut.leaves, found[cut.name], strict=True):
                    if leaf.use != "none":
                        parts.append(self._row(cut, leaf, tensor, i, count, length))
            rows.append(Row(self.file.write(parts), length))
        return rows

    def _row(self, cut: Cut, leaf: Leaf, tensor: Tensor, i: int, count: int, length: int) -> Tensor:
        own = tensor[i * leaf.fold : (i + 1) * leaf.fold]
        if leaf.use == "first":
            own = own[:, :1]
        elif leaf.long:
            own = own[:, :length]
        if len(tensor) != count * leaf.fold or tuple(own.shape) != leaf.row_shape(length) or own.dtype != leaf.dtype:
            raise NotConstant(f"{cut.name} returns {tuple(tensor.shape)}, which differs between batches")
        return own

    def read(self, rows: Sequence[Row]) -> dict[str, list[Tensor]]:
        """Module -> its outputs for these examples, shorter ones padded with zeros."""
        longest = max(row.length for row in rows)
        found: dict[str, list[Tensor]] = {}
        parts = [iter(self.file.read(row.offset, self._kept(row.length))) for row in rows]
        for cut in self.cuts:
            outputs = []
            for leaf in cut.leaves:
                if leaf.use == "none":
                    shape = leaf.row_shape(longest)
                    outputs.append(torch.zeros(len(rows) * shape[0], *shape[1:], dtype=leaf.dtype))
                    continue
                own = [next(part) for part in parts]
                if leaf.long and leaf.use == "all":
                    own = [nn.functional.pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) for t in own]
                outputs.append(torch.cat(own))
            found[cut.name] = outputs
        return found

    def _kept(self, length: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(leaf.row_shape(length), leaf.dtype) for cut in self.cuts for leaf in cut.leaves if leaf.use != "none"]

    @contextmanager
    def playing(self, rows: Sequence[Row]) -> Iterator[None]:
        """While inside, the recorded modules answer for these examples without computing."""
        with self.replaced(self.read(rows)):
            yield

    @contextmanager
    def replaced(self, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
        """While inside, each recorded module returns its `outputs`."""
        for cut in self.cuts:
            device = next((p.device for p in cut.module.parameters()), torch.device("cpu"))
            value = cut.rebuild([t.to(device) for t in outputs[cut.name]])
            object.__setattr__(cut.module, "forward", lambda *_a, value=value, **_k: value)
        try:
            yield
        finally:
            for cut in self.cuts:
                object.__delattr__(cut.module, "forward")
