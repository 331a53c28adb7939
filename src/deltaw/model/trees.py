"""Arguments and outputs of a model as trees of tensors: take some rows out of one, put rows of several together.

Containers: tuples (named ones too), lists, mappings (HF's ModelOutput and BatchEncoding are such), dataclasses.
Everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ModelError


def parts(tree: Any) -> list[tuple[str, Any]] | None:
    """(name, child) of a container, None for a leaf."""
    if isinstance(tree, torch.nn.utils.rnn.PackedSequence):
        return None
    if isinstance(tree, (Mapping, UserDict)):
        return [(str(k), v) for k, v in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree))
    if isinstance(tree, (tuple, list)):
        return [(str(i), v) for i, v in enumerate(tree)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return None


def rebuilt(tree: Any, children: Sequence[Any]) -> Any:
    """A container like `tree` with other children."""
    if isinstance(tree, (Mapping, UserDict)):
        pairs = dict(zip(tree, children))
        if dataclasses.is_dataclass(tree):  # HF's ModelOutput
            return type(tree)(**pairs)
        if isinstance(tree, dict):
            new = copy.copy(tree)
            new.update(pairs)
            return new
        return type(tree)(pairs)  # type: ignore[call-arg]
    if isinstance(tree, tuple):
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    if isinstance(tree, list):
        return list(children)
    new = copy.copy(tree)
    for field, child in zip(dataclasses.fields(tree), children):
        object.__setattr__(new, field.name, child)
    return new


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of every leaf."""
    inside = parts(tree)
    if inside is None:
        yield name, tree
    else:
        for part, child in inside:
            yield from leaves(child, f"{name}.{part}" if name else part)


def mapped(tree: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """`tree` with `change(dotted name, leaf)` in the place of every leaf."""
    inside = parts(tree)
    if inside is None:
        return change(name, tree)
    return rebuilt(tree, [mapped(child, change, f"{name}.{part}" if name else part) for part, child in inside])


def together(trees: Sequence[Any], join: Callable[[str, Sequence[Any]], Any], name: str = "") -> Any:
    """One tree out of several of the same form; `join(dotted name, leaves)` makes each leaf.

    Raises:
        ModelError: they are not of one form.
    """
    first = parts(trees[0])
    if first is None:
        return join(name, trees)
    columns = [parts(tree) for tree in trees]
    if any(c is None or [n for n, _ in c] != [n for n, _ in first] for c in columns):
        raise ModelError(
            f"dw.rows: the groups of the batch gave outputs of different form{' at ' + repr(name) if name else ''}: "
            "they cannot be put together"
        )
    inner = [
        together([c[i][1] for c in columns if c is not None], join, f"{name}.{part}" if name else part)
        for i, (part, _) in enumerate(first)
    ]
    return rebuilt(trees[0], inner)


def take(tensor: Tensor, rows: Sequence[int], dim: int = 0) -> Tensor:
    """The given rows of a tensor, in this order: a view if they follow one another, else a copy."""
    first, count = rows[0], len(rows)
    if all(row == first + i for i, row in enumerate(rows)):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))


def taken(tree: Any, dims: Mapping[str, int], rows: Sequence[int]) -> Any:
    """`tree` with only the given rows of the tensors that `dims` names, {dotted name: dimension}."""
    return mapped(tree, lambda name, leaf: take(leaf, rows, dims[name]) if name in dims else leaf)


def unfold(rows: Sequence[int], multiple: int) -> list[int]:
    """Row indices where every row stands for `multiple` entries that follow one another."""
    return list(rows) if multiple == 1 else [r * multiple + k for r in rows for k in range(multiple)]


def place(pieces: Sequence[Tensor], rows: Sequence[Sequence[int]], dim: int = 0) -> Tensor:
    """The inverse of `take`: `pieces[i]` holds `rows[i]` of the result."""
    order = [row for group in rows for row in group]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)
    if order == list(range(len(order))):
        return whole
    back = sorted(range(len(order)), key=order.__getitem__)
    return whole.index_select(dim, torch.tensor(back, device=whole.device))
