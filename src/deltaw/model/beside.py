"""The large frozen linear layers beside the adapted ones (an output head, what the targets leave out).

Gradients of the adapters below pass through them, so they take part in every step, and on processors where `ops/matmul.py`
knows a faster product they may as well use it. Elsewhere nothing is done. Such a layer keeps its forward to the bit as
long as the adapters are fresh, merged or silent: it asks one adapted layer, the last one of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.core.host import Host
from deltaw.model.state import Layout
from deltaw.ops.linear import frozen_linear
from deltaw.ops.matmul import mkl_is_slow

WORTH = 1 << 14
"""Numbers in a weight from which on a layer is looked at."""


class FrozenLinear(nn.Linear):
    """An nn.Linear that nobody trains. `told_by`: the adapted layer that says whether changes are in force."""

    stands_for = nn.Linear
    told_by: Host

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias, self.told_by.moved)


def settle(layout: Layout) -> None:
    """Make the large frozen linear layers beside the model's hosts such, and plain again where there are no hosts."""
    if not mkl_is_slow():
        return
    told_by = None
    for module in reversed(layout.modules):
        if isinstance(module, Host) and module.adapters._modules:
            told_by = module
            break
    for module in layout.modules:
        kind = type(module)
        if told_by is not None and (kind is nn.Linear or kind is FrozenLinear) and stays_frozen(module):
            module.__dict__["told_by"] = told_by  # no child of it
            object.__setattr__(module, "__class__", FrozenLinear)
        elif kind is FrozenLinear:
            del module.__dict__["told_by"]
            object.__setattr__(module, "__class__", nn.Linear)


def stays_frozen(layer: nn.Module) -> bool:
    """Whether a linear layer is plain, large, and trains nothing."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        weight is not None
        and weight.numel() >= WORTH
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )
