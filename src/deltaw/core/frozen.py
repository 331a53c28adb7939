"""IN WHAT FORM the frozen weight is kept: a `Form` (the options, a value) makes one `FrozenWeight` (the kept tensors) per weight.

A form file knows matrices only, as a variant file does. It never learns which layer the matrix belongs to or how it changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deltaw.core.options import Options
from deltaw.core.registry import foreign_readers
from deltaw.core.variant import FrozenMatrix, state_of
from deltaw.ops.choices import Choices


class FrozenWeight(nn.Module, FrozenMatrix):
    """One frozen weight W (out, in) in some form. Its buffers are what a state dict keeps of it.

    form: the options that made it. shape: (out, in). dtype: that of the weight it stands for, which follows `model.to(dtype)`;
    the kept tensors do not.
    """

    codes: Tensor
    """The kept tensor, which `layer.weight` gives."""
    name: str = ""
    """The parameter's name in the model, for messages and records."""
    choices: Choices | None = None
    """The record of which kernels its products run on, one for the whole model; None where there is nothing to choose."""
    record: Any = None
    """What `dequantize` needs, if the weight is a model's."""

    def __init__(self, form: Form, weight: Tensor) -> None:
        super().__init__()
        self.form = form
        self.shape = tuple(weight.shape)
        self.dtype = weight.dtype

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ, (..., in) -> (..., out): a fresh tensor in x's dtype. Not differentiated: the caller owns the backward."""

    @abstractmethod
    def matmul_grad(self, g: Tensor) -> Tensor:
        """g W, (..., out) -> (..., in): a fresh tensor in g's dtype, the gradient of `matmul` for x."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight that this stands for, (out, in), in `dtype`."""

    def state(self) -> Hashable:
        return state_of(*(b for b in self._buffers.values() if b is not None))

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the kept tensors, but never casts them: a scale rounded to 16 bit would change the weight."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype == tensor.dtype:
                return new
            return torch.empty_like(tensor, device=new.device) if new.is_meta else tensor.to(new.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.form}, {self.shape[0]} x {self.shape[1]}, {self.nbytes:,} bytes"


@dataclass(frozen=True, kw_only=True, repr=False)
class Form(Options, ABC):
    """Options and identity of one form. Equal forms are equal values; printing one prints the call that makes it."""

    kind: ClassVar[str]
    """The form's name in files, on the command line and in tables."""
    rounding: ClassVar[float] = 0.0
    """How far a product may be from that with `dense()`, relative to its size, on inputs without outliers (0: a rounding)."""

    @abstractmethod
    def keep(self, weight: Tensor) -> FrozenWeight:
        """`weight` (out, in), finite, in this form."""

    def objection(self, weight: Tensor, kept: FrozenWeight) -> str | None:
        """Why `weight` had better stay as it is instead of `kept`, or None."""
        return None

    @classmethod
    def examples(cls) -> Iterable[Form]:
        """Instances for the laws."""
        return (cls(),)


def foreign_dense(layer: nn.Module, weight: Tensor) -> Tensor | None:
    """The weight (stored shape) that a tensor which another library has quantised stands for; None for a plain tensor.

    Libraries are known by files in frozen/ that register a reader, `read(layer, weight) -> Tensor | None`.
    """
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        return None
    for _, read in foreign_readers.items():
        dense = read(layer, weight)
        if dense is not None:
            found: Tensor = dense.detach()
            return found
    return None
