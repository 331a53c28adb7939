"""A frozen linear layer beside the adapted ones: no host, but told by one whether changes are in force (decision 024).

Gradients of the adapters below pass through such layers, so they take part in every step, and may use the faster product
of `ops/matmul.py`. model/beside.py says which layers are made such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from deltaw.ops.frozen_dense import frozen_linear

if TYPE_CHECKING:
    from deltaw.core.host import Host


class FrozenLinear(nn.Linear):
    """An nn.Linear that nobody trains. Its output keeps its bits until `told_by`, an adapted layer, has moved."""

    told_by: Host

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias, self.told_by.has_moved)


def beside(layer: nn.Module, told_by: Host) -> None:
    """Make a plain nn.Linear, or a FrozenLinear, one that is told by that host."""
    layer.__dict__["told_by"] = told_by  # no child of it
    object.__setattr__(layer, "__class__", FrozenLinear)


def plain_again(layer: nn.Module) -> None:
    """Undo `beside`; other layers stay as they are."""
    if type(layer) is FrozenLinear:
        del layer.__dict__["told_by"]
        object.__setattr__(layer, "__class__", nn.Linear)


def own_class(layer: nn.Module) -> type[nn.Module]:
    """A layer's class, that of a FrozenLinear being nn.Linear."""
    kind = type(layer)
    return nn.Linear if kind is FrozenLinear else kind
