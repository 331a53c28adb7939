"""Models that transformers loaded in 4 or 8 bit: while they carry adapters, `transformers.Trainer` may train them.

The Trainer refuses a quantised model unless it is PEFT's or its quantizer says that it can be trained. With adapters it
can: so the quantizer says so, its class changed to a subclass, and changed back when the last adapter leaves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_classes: dict[type, type] = {}


def open_gate(model: nn.Module) -> None:
    """Let the model's transformers quantizer, if it has one, report that the model can be trained."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or type(quantizer) in _classes.values() or getattr(quantizer, "is_qat_trainable", True):
        return
    base = type(quantizer)
    if base not in _classes:
        _classes[base] = type(f"{base.__name__}WithAdapters", (base,), {"is_qat_trainable": True})
    quantizer.__class__ = _classes[base]


def close_gate(model: nn.Module) -> None:
    """Give the quantizer its own class back."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if type(quantizer) in _classes.values():
        quantizer.__class__ = type(quantizer).__base__
