"""Which layers see the batch's rows in their first dimension: found out by running the model on a few rows, twice.

The base model runs on rows (0, 1, 2) and then on rows (1, 0), without dropout or gradients. A tensor that a layer is
given "follows" the rows if its first dimension has as many entries (times a declared multiple) in both runs and the
entries of the second run are those of the first, in the order of the rows; it is "shared" if it is equal in both. Any
other (time first, detectors folded into the batch, a table of relative positions) is foreign, and the layer is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltaw.core.roster import ByRow
from deltaw.model import trees

FIRST, SECOND = (0, 1, 2), (1, 0)
CLOSE, CLOSE_16 = 1e-3, 5e-2
"""Relative distance up to which two entries count as the same: products of other batch sizes round differently."""
DROPOUTS = {"dropout", "dropout_", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"} | {
    f"dropout{d}d" for d in (1, 2, 3)
}


def sample(count: int) -> tuple[list[int], list[int]]:
    """The rows of the first and of the second run, out of `count`."""
    return [r % count for r in FIRST], [r % count for r in SECOND]


@dataclass
class Mark:
    """A tensor seen in a run: its shape, and for every entry of its first dimension two projections and the length."""

    shape: tuple[int, ...]
    prints: Tensor
    close: float


def mark(tensor: Tensor) -> Mark:
    """The mark of a tensor."""
    entries = tensor.shape[0] if tensor.ndim else 1
    flat = torch.nan_to_num(tensor.detach().reshape(entries, math.prod(tensor.shape[1:])).to(torch.float64))
    ramp = torch.arange(flat.shape[1], dtype=torch.float64, device=flat.device) * 1.37
    prints = torch.stack([flat @ torch.cos(ramp), flat @ torch.sin(ramp), torch.linalg.vector_norm(flat, dim=1)], 1)
    return Mark(tuple(tensor.shape), prints.cpu(), CLOSE_16 if tensor.dtype.itemsize <= 2 else CLOSE)


def same(a: Tensor, b: Tensor, close: float) -> bool:
    """Whether two sets of prints agree within rounding, which grows with an entry's length."""
    return bool(((a - b).abs() <= close * a[:, 2:] + 1e-30).all())


FOREIGN, SHARED, FOLLOWS = "foreign", "shared", "follows"


def verdict(first: Mark, second: Mark, multiple: int) -> str:
    """What a tensor is to the rows, from its marks in both runs."""
    n, m = len(FIRST) * multiple, len(SECOND) * multiple
    if first.shape and second.shape and first.shape[0] == n and second.shape[0] == m:
        if first.shape[1:] == second.shape[1:]:
            rows = trees.unfold(SECOND, multiple)
            picked = first.prints[rows]
            if same(picked, second.prints, first.close):
                return FOLLOWS
    elif first.shape == second.shape and same(first.prints, second.prints, first.close):
        return SHARED
    return FOREIGN


class Recorder(ByRow):
    """Speaks during the probe: the bare base answers, and what every host is given and gives is marked."""

    def __init__(self) -> None:
        self.calls: dict[int, list[tuple[list[Mark], list[Mark]]]] = {}

    def call(self, host: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [mark(t) for _, t in trees.leaves((args, kwargs)) if isinstance(t, Tensor)]
        strange = any(opaque(leaf) for _, leaf in trees.leaves((args, kwargs)))
        seen = self.calls.setdefault(id(host), [])
        with host.roster.using(()):
            output = forward(host, *args, **kwargs)
        gives = [mark(t) for _, t in trees.leaves(output) if isinstance(t, Tensor)]
        seen.append(([], []) if strange else (given, gives))
        return output


@dataclass(frozen=True)
class Found:
    """What the probe found. `foreign`: id of a host -> why it cannot be told which rows it works on.

    `follows`: id of a host -> which of its tensor arguments follow the rows. `outputs`: for every tensor that the model
    gives, the dimension that counts the rows (None: the same for all rows). `in_order`: every output is known to follow
    the rows' order or to be the same for all of them, so that the rows may be sorted at the model's entry.
    """

    foreign: Mapping[int, str] = field(default_factory=dict)
    follows: Mapping[int, tuple[bool, ...]] = field(default_factory=dict)
    outputs: Mapping[str, int | None] = field(default_factory=dict)
    in_order: bool = False


def compared(first: Recorder, second: Recorder, multiples: Mapping[int, int], outputs: tuple[Any, Any]) -> Found:
    """The verdict on every host that was called, and on the outputs of the model."""
    foreign: dict[int, str] = {}
    follows: dict[int, tuple[bool, ...]] = {}
    for host in {**first.calls, **second.calls}:
        one, two = first.calls.get(host, []), second.calls.get(host, [])
        multiple = multiples.get(host, 1)
        if len(one) != len(two):
            foreign[host] = f"is called {len(one)} times for {len(FIRST)} rows and {len(two)} times for {len(SECOND)}"
            continue
        patterns = set()
        for (given, gives), (given2, gives2) in zip(one, two):
            verdicts = [verdict(a, b, multiple) for a, b in zip(given, given2)]
            outs = [verdict(a, b, multiple) for a, b in zip(gives, gives2)]
            wrong = next((i for i, v in enumerate(verdicts) if v == FOREIGN), None)
            if wrong is not None:
                foreign[host] = foreign_reason(given[wrong].shape, given2[wrong].shape, multiple)
            elif FOLLOWS not in verdicts:
                shape = given[0].shape if given else ()
                foreign[host] = f"is called with {tuple(shape)}, which is the same for all rows"
            elif any(v != FOLLOWS for v in outs):
                foreign[host] = "gives an output whose first dimension is not the rows"
            patterns.add(tuple(v == FOLLOWS for v in verdicts))
        if len(patterns) > 1:
            foreign.setdefault(host, "is called in different ways")
        elif patterns:
            follows[host] = patterns.pop()
    one_out, two_out = (dict(trees.leaves(o)) for o in outputs)
    dims: dict[str, int | None] = {}
    for name, tensor in one_out.items():
        other = two_out.get(name)
        if isinstance(tensor, Tensor) and isinstance(other, Tensor) and tensor.ndim == other.ndim:
            moved = [d for d in range(tensor.ndim) if tensor.shape[d] != other.shape[d]]
            if len(moved) <= 1:
                dims[name] = moved[0] if moved else None
    known = one_out.keys() == two_out.keys()
    in_order = known and all(ordered(leaf, two_out[name], dims.get(name)) for name, leaf in one_out.items())
    return Found(foreign, follows, dims, in_order)


def ordered(one: Any, two: Any, dim: int | None) -> bool:
    """Whether an output of the model follows the rows' order (in `dim`), or is the same for all rows."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return not opaque(one) and type(one) is type(two) and bool(one == two)
    if dim is None:
        return verdict(mark(one), mark(two), 1) == SHARED
    multiple = one.shape[dim] // len(FIRST)
    return multiple > 0 and verdict(mark(one.movedim(dim, 0)), mark(two.movedim(dim, 0)), multiple) == FOLLOWS


def foreign_reason(one: tuple[int, ...], two: tuple[int, ...], multiple: int) -> str:
    """Why a tensor's first dimension is not the rows."""
    n, m = len(FIRST), len(SECOND)
    if one and two and one[0] % n == 0 and two[0] % m == 0 and one[0] // n == two[0] // m != multiple:
        return f"has {one[0] // n} entries for each row in its first dimension (declare it if they follow one another)"
    if one and two and one[0] == n * multiple and two[0] == m * multiple:
        return "has as many entries as rows in its first dimension, but they are not the rows in their order"
    return f"has first dimension {one[0] if one else '-'} for {n} rows and {two[0] if two else '-'} for {m}"


def opaque(leaf: Any) -> bool:
    """Whether a leaf may hide tensors or state (a cache, a packed sequence), so that its rows cannot be taken."""
    plain = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None), slice)
    return not isinstance(leaf, plain) and not callable(leaf)


class NoDropout(TorchFunctionMode):
    """Within it, in this thread, dropout does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            return args[0] if args else kwargs.get("input")
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs.pop("dropout_p", None)
        if name == "multi_head_attention_forward":
            kwargs["training"] = False
        return func(*args, **kwargs)
