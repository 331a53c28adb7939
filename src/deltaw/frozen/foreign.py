"""Weights that bitsandbytes or torchao have quantised: what they stand for.

Models that transformers loads in 8 or 4 bit are adapted as they are: the layer's own product stays in charge, and the
low-rank terms are added to what it returns. The dense weight is needed only where a change depends on it (DoRA's norms).
Neither library is imported here: their tensors are known by what they carry.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.registry import foreign_reader


@foreign_reader("bitsandbytes")
def bitsandbytes_dense(layer: nn.Module, weight: Tensor) -> Tensor | None:
    """Linear4bit: blockwise codes with a `quant_state`. Linear8bitLt: int8 rows whose absolute maxima are `SCB`."""
    parameter: Any = weight
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        functional = importlib.import_module("bitsandbytes.functional")
        dense: Tensor = functional.dequantize_4bit(parameter.data, quant_state)
        return dense
    maxima = getattr(parameter, "SCB", None)
    if maxima is None:
        maxima = getattr(getattr(layer, "state", None), "SCB", None)
    if weight.dtype != torch.int8 or maxima is None:
        return None
    scales: Tensor = maxima.float() / 127
    return weight.data.float() * scales[:, None]


@foreign_reader("torchao")
def torchao_dense(layer: nn.Module, weight: Tensor) -> Tensor | None:
    """A tensor subclass with a `dequantize` of its own."""
    kind: Any = type(weight)
    if not isinstance(weight, Tensor) or kind.dequantize is Tensor.dequantize:
        return None
    dense: Tensor = weight.dequantize()
    return dense
