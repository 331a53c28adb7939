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
from deltaw.core.variant import Delta, Dense, FrozenMatrix, Site, fits
from deltaw.errors import AdapterError, ConfigError
from deltaw.ops.product import Product, total


class _Needed(Exception):
    """The base weight was asked for, and nobody gave one."""


class _Absent(FrozenMatrix):
    """Stands for a frozen weight that is not there."""

    def state(self) -> None:
        return None

    def matmul(self, x: Tensor) -> Tensor:
        raise _Needed

    def dense(self) -> Tensor:
        raise _Needed


Matrix = Product | Tensor
"""A change's matrix: factors if it has them, else dense in float64."""


def delta_of(change: Change, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Delta:
    """The change's `Delta` in evaluation mode, on its own tensors, or on copies of them in `dtype`.

    shape: of the weight, where the tensors do not tell it.
    """
    tensors = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in change.tensors.items()}
    first = next(iter(tensors.values()))
    site = Site(shape or change.matrix_shape, first.dtype, first.device, buffer=not first.is_floating_point())
    delta = change.variant.create(site, {})
    delta.load_state_dict(tensors, assign=True)
    return delta.eval()


def any_shape(change: Change) -> bool:
    """True for changes of parameters of any shape (trained copies, dense differences): they need not be matrices."""
    return change.variant.any_shape


def check_finite(key: str, change: Change) -> None:
    """Raise AdapterError if a tensor of the change holds NaN or infinite values."""
    for name, tensor in change.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key}.{name} holds NaN or infinite values: nothing can be computed with this adapter")


def as_product(change: Change) -> Product | None:
    """ΔW as `left` (out, k) times `right` (k, in), if the factors say it all; None if ΔW depends on the base weight."""
    if any_shape(change) or -1 in change.matrix_shape:
        return None
    try:
        with torch.no_grad():
            terms = delta_of(change).low_rank(_Absent())
    except _Needed:
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
    if weight is None:
        return _without_weight(key, change)
    if not fits(change.matrix_shape, weight.shape):
        raise AdapterError(
            f"{key}: the base weight is {tuple(weight.shape)}, but the change is {tuple(change.matrix_shape)}: "
            f"this is not the base it was trained on"
        )
    delta = delta_of(change, torch.float64, tuple(weight.shape))
    with torch.no_grad():
        weight = weight.to(delta.site.device, torch.float64)
        delta.prepare(Dense(weight))
        return delta.delta_weight(weight).detach()


def true_changes(key: str, change: Change, weight: Tensor | None = None) -> list[Matrix]:
    """`true_change` matrix by matrix: one for a plain weight, E for a stack of experts (E, out, in)."""
    shape = change.matrix_shape
    if any_shape(change) or len(shape) < 3:
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


def _without_weight(key: str, change: Change) -> Tensor:
    """The dense ΔW of a change that does not ask for the weight."""
    dense = None
    if -1 not in change.matrix_shape:
        delta = delta_of(change, torch.float64)
        try:
            with torch.no_grad():
                dense = delta.delta_weight(torch.empty(change.matrix_shape, device="meta", dtype=torch.float64))
        except (NotImplementedError, RuntimeError):
            dense = None  # a real tensor met the absent weight: ΔW does depend on it
    if dense is None or dense.is_meta:
        raise ConfigError(
            f"ΔW of {key} ({change.variant.kind}) depends on the base weight: give the model it was trained on "
            f"(`base=model`, or a mapping of parameter names to tensors; `--base` on the command line)"
        )
    return dense.detach()
