"""Which frozen linear layers are made `FrozenLinear`: the large ones, on processors where a faster product is known.

They are told by one adapted layer, the last one of the model. Elsewhere nothing is done.
"""

from __future__ import annotations

import torch
from torch import nn

from deltaw.core.beside import FrozenLinear, beside, plain_again
from deltaw.core.host import Host
from deltaw.model.state import Layout
from deltaw.ops.matmul import mkl_is_slow

WORTH = 1 << 14
"""Numbers in a weight from which on a layer is looked at."""


def settle(layout: Layout) -> None:
    """Make the large frozen linear layers beside the model's hosts such, and plain again where there are no hosts."""
    if not mkl_is_slow():
        return
    adapted = (m for m in reversed(layout.modules) if isinstance(m, Host) and m.adapters._modules)
    told_by = next(adapted, None)
    for module in layout.modules:
        kind = type(module)
        if kind is nn.Linear or kind is FrozenLinear:
            if told_by is not None and stays_frozen(module):
                beside(module, told_by)
            else:
                plain_again(module)


def stays_frozen(layer: nn.Module) -> bool:
    """Whether a linear layer is plain, large, and trains nothing."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        weight is not None
        and weight.numel() >= WORTH
        and weight.dtype == torch.float32
        and weight.is_cpu
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )
