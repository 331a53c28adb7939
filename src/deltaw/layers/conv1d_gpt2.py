"""GPT-2's `Conv1D` (transformers): a linear layer that stores its weight transposed, (in, out).

Its matrix is weightᵀ, so adapters have A (rank, in) and B (out, rank) as for nn.Linear, and the fused operation of
nn.Linear computes it. It is recognised by its name, transformers need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.layers.output import OutputHost
from deltaw.ops.linear import adapted_linear

HOME, NAME = "transformers.pytorch_utils", "Conv1D"


@host
class Conv1DHost(OutputHost):
    """An adapted Conv1D of GPT-2."""

    family: ClassVar[str] = "conv1d_gpt2"
    takes_forms: ClassVar[bool] = True
    bias: Tensor

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        kind = type(layer)
        own: Any = next((c for c in kind.__mro__ if c.__name__ == NAME and c.__module__ == HOME), None)
        return own is not None and bool(kind.forward is own.forward)

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": (int(layer.nf), int(layer.nx))}  # type: ignore[arg-type]

    def to_matrix(self, site: str, stored: Tensor) -> Tensor:
        return stored.mT if site == "weight" else stored

    def from_matrix(self, site: str, matrix: Tensor) -> Tensor:
        return matrix.mT if site == "weight" else matrix

    @classmethod
    def examples(cls) -> Iterable[Example]:
        if importlib.util.find_spec("transformers") is None:
            return
        Conv1D: Any = getattr(importlib.import_module(HOME), NAME)
        yield Example("fused qkv", lambda: Conv1D(21, 7), lambda dtype: (torch.randn(2, 3, 7, dtype=dtype),))
        yield Example("one feature", lambda: Conv1D(1, 1), lambda dtype: (torch.randn(4, 1, dtype=dtype),))
        yield Example("square", lambda: Conv1D(6, 6), lambda dtype: (torch.randn(2, 6, dtype=dtype),))

    def forward(self, x: Tensor) -> Tensor:
        form = self.form("weight")
        if not self.active_sites():
            if form is not None:
                return adapted_linear(x, None, self.bias, (), training=self.training, frozen=form)
            return super().forward(x)  # type: ignore[no-any-return, misc]
        bias = self.changed("bias")
        terms = self.low_rank()
        if terms is None and form is not None:
            y = adapted_linear(x, None, bias, (), training=self.training, frozen=form)
            return y + x @ self.apart("weight").to(x.dtype)
        if terms is None or not terms:
            flat = torch.addmm(bias, x.view(-1, x.shape[-1]), self.changed("weight"))
            return flat.view(*x.shape[:-1], flat.shape[-1])
        weight = self.weight.mT if form is None else None
        return adapted_linear(x, weight, bias, terms, training=self.training, frozen=form)
