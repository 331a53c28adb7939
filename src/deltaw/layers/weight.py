"""What layers have in common that run with W + ΔW: their own forward, on a per-call shallow twin that holds the sum.

Nothing of the shared layer is mutated, so two threads may use two adapters at once. A variant's dropout zeroes features
for the whole call (see `Host.change`), since these layers have no one input that A sees.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltaw.core.host import Host
from deltaw.core.twin import shell


class WeightHost(Host):
    """A layer that computes with its changed weights."""

    def twin(self, sites: set[str]) -> nn.Module:
        """This layer, of its plain class, with the active changes written into the parameters `sites`."""
        tensors: dict[str, Tensor | None] = {s: self.changed(s, dropout=self.training) for s in sites}
        return shell(self, self.base_class, tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = self.active_sites()
        return self.base_class.forward(self.twin(sites) if sites else self, *args, **kwargs)
