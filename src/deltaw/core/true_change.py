"""What a `Change` truly does to its weight, as a value to compute with: factors where it has them, else the dense ΔW.

A LoRA's ΔW = s·BA is a `Product` and stays one. A change that depends on the weight (DoRA rescales its rows, a trained
copy is W' - W) is formed densely, from the base weight that the caller must give. Which of the two a method is, is asked
of its delta (`low_rank`), never of its name.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.unread import Read, stand_in
from deltaw.core.variant import Dense, fits
from deltaw.errors import AdapterError, ConfigError
from deltaw.ops.product import Product, total

Matrix = Product | Tensor
"""A change's matrix: factors if it has them, else dense in float64."""


def check_finite(key: str, change: Change) -> None:
    """Raise AdapterError if a tensor of the change holds NaN or infinite values."""
    for name, tensor in change.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key}.{name} holds NaN or infinite values: nothing can be computed with this adapter")


def as_product(change: Change) -> Product | None:
    """ΔW as `left` (out, k) times `right` (k, in), if the factors say it all; None if ΔW depends on the base weight."""
    if change.variant.any_shape or -1 in change.matrix_shape:
        return None
    first = next(iter(change.tensors.values()))
    try:
        with torch.no_grad():
            terms = change.delta().low_rank(Dense(stand_in(change.matrix_shape, first)))
    except Read:
        return None
    if not terms or any(term.gain is not None or term.A.ndim > 2 for term in terms):
        return None
    return total(Product(t.B.detach(), t.A.detach(), float(t.scale)) for t in terms)


def true_change(key: str, change: Change, weight: Tensor | None = None) -> Matrix:
    """ΔW of the parameter `key`: a `Product` if factors say it all, else dense in float64, of the weight's shape.

    weight: the base weight as the (out, in) matrix (stored shape for changes of any shape); needed only by methods
        whose ΔW depends on it.

    Raises:
        ConfigError: ΔW depends on the base weight, and none was given.
        AdapterError: a tensor is not finite, or `weight` is of another shape than the change.
    """
    check_finite(key, change)
    product = as_product(change)
    if product is not None:
        return product
    if weight is not None and not fits(change.matrix_shape, weight.shape):
        raise AdapterError(
            f"{key}: the base weight is {tuple(weight.shape)}, but the change is {tuple(change.matrix_shape)}: "
            f"this is not the base it was trained on"
        )
    try:
        return change.delta_weight(weight, torch.float64)
    except ConfigError:
        raise ConfigError(
            f"ΔW of {key} ({change.variant.kind}) depends on the base weight: give the model it was trained on "
            f"(`base=model`, or a mapping of parameter names to tensors; `--base` on the command line)"
        ) from None


def true_changes(key: str, change: Change, weight: Tensor | None = None) -> list[Matrix]:
    """`true_change` matrix by matrix: one for a plain weight, E for a stack of experts (E, out, in)."""
    shape = change.matrix_shape
    if change.variant.any_shape or len(shape) < 3:
        return [true_change(key, change, weight)]
    if all(t.ndim == 3 and t.shape[0] == shape[0] for t in change.tensors.values()):
        check_finite(key, change)
        each = [replace(change, tensors={n: t[e] for n, t in change.tensors.items()}) for e in range(shape[0])]
        products = [as_product(c) for c in each]
        if all(p is not None for p in products):
            return [p for p in products if p is not None]
    dense = true_change(key, change, weight)
    assert isinstance(dense, Tensor)
    return list(dense)
