"""What a `Change` truly does to its weight, as a value to compute with: factors where it has them, else the dense ΔW.

A LoRA's ΔW = s·BA is a `Product` and stays one. A change that depends on the weight (DoRA rescales its rows, a trained
copy is W' - W) is formed densely, from the base weight that the caller must give. Which of the two a method is, is asked
of its delta (`low_rank`), never of its name.
"""

from __future__ import annotations

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

    def matmul(self, x: Tensor) -> Tensor:
        raise _Needed

    def dense(self) -> Tensor:
        raise _Needed


def delta_of(change: Change, dtype: torch.dtype | None = None) -> Delta:
    """The change's `Delta` in evaluation mode, on its own tensors, or on copies of them in `dtype`."""
    tensors = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in change.tensors.items()}
    first = next(iter(tensors.values()))
    delta = change.variant.create(Site(change.matrix_shape, first.dtype, first.device), {})
    delta.load_state_dict(tensors, assign=True)
    return delta.eval()


def is_copy(change: Change) -> bool:
    """True for changes of parameters of any shape (a trained copy): they need not have an (out, in) matrix."""
    return change.variant.any_shape


def check_finite(key: str, change: Change) -> None:
    """Raise AdapterError if a tensor of the change holds NaN or infinite values."""
    for name, tensor in change.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key}.{name} holds NaN or infinite values: nothing can be computed with this adapter")


def as_product(change: Change) -> Product | None:
    """ΔW as `left` (out, k) times `right` (k, in), if the factors say it all; None if ΔW depends on the base weight."""
    if is_copy(change):
        return None
    try:
        with torch.no_grad():
            terms = delta_of(change).low_rank(_Absent())
    except _Needed:
        return None
    if not terms or any(term.gain is not None for term in terms):
        return None
    return total(Product(t.B.detach(), t.A.detach()).scaled(float(t.scale)) for t in terms)


def true_change(key: str, change: Change, weight: Tensor | None = None) -> Product | Tensor:
    """ΔW of the parameter `key`: a `Product` if factors say it all, else dense in float64, (out, in) or stored shape.

    weight: the base weight as the (out, in) matrix (stored shape for trained copies); needed only by methods whose ΔW
        depends on it.

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
    delta = delta_of(change, torch.float64)
    with torch.no_grad():
        try:
            if weight is not None:
                weight = weight.to(delta.site.device, torch.float64)
                delta.prepare(Dense(weight))
                return delta.delta_weight(weight).detach()
            dense = delta.delta_weight(torch.empty(change.matrix_shape, device="meta", dtype=torch.float64))
        except (NotImplementedError, RuntimeError):
            if weight is not None:
                raise
            dense = torch.empty(0, device="meta")  # a CPU tensor met the absent weight: it does depend on it
    if dense.is_meta:
        raise ConfigError(
            f"ΔW of {key} ({change.variant.kind}) depends on the base weight: give the model it was trained on "
            f"(`base=model`, or a mapping of parameter names to tensors; `--base` on the command line)"
        )
    return dense.detach()
