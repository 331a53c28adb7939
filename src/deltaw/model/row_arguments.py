"""Which dimension of each argument of a call counts the rows of its batch, for `dw.rows`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from deltaw.errors import ModelError
from deltaw.model import trees

Dims = int | Mapping[str | int, int | None] | None

NEVER_ROWS = ("cache_position",)
"""Arguments of transformers models that have a length, never rows, in their only dimension."""


def row_dims(
    dims: Dims, count: int, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, int], dict[str, str]]:
    """Dotted name (in the tree `(args, kwargs)`) -> dimension that counts the rows, of the arguments that have rows; and
    name -> argument of those of which only their size says so."""
    try:
        parameters = list(inspect.signature(plain).parameters)
    except (TypeError, ValueError):
        parameters = []
    where: dict[str, int] = {}
    doubtful: dict[str, str] = {}
    shapes: list[str] = []
    for name, leaf in trees.leaves((args, kwargs)):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            continue
        side, _, rest = name.partition(".")
        top = rest.partition(".")[0]
        position = int(top) if side == "0" else None
        called = top if position is None else parameters[position] if position < len(parameters) else top
        shapes.append(f"{called} {tuple(leaf.shape)}")
        dim, declared = declared_dim(dims, called, position)
        if dim is None:
            continue
        if -leaf.ndim <= dim < leaf.ndim and leaf.shape[dim] == count:
            where[name] = dim % leaf.ndim
            if not declared:
                doubtful[name] = called
        elif declared:
            raise ModelError(
                f"dw.rows: argument {called} has shape {tuple(leaf.shape)}; its dimension {dim} is declared to be the "
                f"rows, of which there are {count}"
            )
    if not where:
        raise ModelError(
            f"dw.rows names {count} rows, but no argument has so many: {', '.join(shapes) or 'no tensors'}; "
            "give one name for each row, or say which dimension is the rows: dims=1, or dims={'x': 1, 'mask': None}"
        )
    return where, doubtful


def declared_dim(dims: Dims, name: str, position: int | None) -> tuple[int | None, bool]:
    """(dimension, whether it was declared for this very argument)."""
    if isinstance(dims, Mapping):
        for key in (name, position):
            if key is not None and key in dims:
                return dims[key], True
        return (None if name in NEVER_ROWS else 0), False
    return (None if name in NEVER_ROWS else dims), False


def usual_dim(model: nn.Module) -> int:
    """The dimension of the rows in the inputs of torch.nn's own sequence modules, 0 for all other models."""
    seen: Any = model
    if isinstance(model, (nn.TransformerEncoder, nn.TransformerDecoder)):
        seen = model.layers[0]
    if isinstance(seen, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        seen = seen.self_attn
    own = isinstance(seen, (nn.RNNBase, nn.Transformer, nn.MultiheadAttention))
    return 1 if own and not seen.batch_first else 0


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What two calls have in common that ask the same of the model: everything but the tensors' sizes and values."""
    return tuple(
        (name, leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else (name, repr(leaf))
        for name, leaf in trees.leaves((args, kwargs))
    )


def argument(name: str) -> str:
    """How a leaf of `(args, kwargs)` is called in messages."""
    side, _, rest = name.partition(".")
    return f"positional argument {rest}" if side == "0" else f"argument {rest!r}"
