"""GPT-2's `Conv1D` (transformers): a linear layer that stores its weight transposed, (in, out).

Its matrix is weightᵀ, so adapters have A (rank, in) and B (out, rank) as for nn.Linear, and it computes as that does.
It is recognised by its name, transformers need not be installed.
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
from deltaw.layers.product import ProductHost

HOME, NAME = "transformers.pytorch_utils", "Conv1D"


@host
class Conv1DHost(ProductHost):
    """An adapted Conv1D of GPT-2."""

    family: ClassVar[str] = "conv1d_gpt2"

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        own: Any = next((c for c in kind.__mro__ if c.__name__ == NAME and c.__module__ == HOME), None)
        return own is not None and bool(kind.forward is own.forward)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return cls.accepts_class(type(layer))

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
