"""The host of last resort: any module, its own parameters and buffers trained in full, its own forward kept.

The forward runs on a shell, a per-call shallow twin with the changed tensors: nothing shared is mutated, so two threads
may use two adapters. It also keeps running statistics still: in training a frozen BatchNorm normalises with the batch,
as it always did, and updates a throw-away copy of its buffers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from deltaw.core.host import Host, shell
from deltaw.core.registry import host


@host
class ModuleHost(Host):
    """A module of any class with parameters of its own."""

    family: ClassVar[str] = "module"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    full_only: ClassVar[bool] = True

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = self.active_sites()
        still = self.training and bool(self._buffers)
        if not sites and not still:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        parameters: dict[str, Tensor | None] = {s: self.changed(s) for s in sites if s in self._parameters}
        buffers: dict[str, Tensor | None] = {s: self.own_buffer(s) for s in sites if s in self._buffers}
        if still:
            for name, buffer in self._buffers.items():
                if name not in buffers and buffer is not None:
                    buffers[name] = buffer.clone()
        return self.base_class.forward(shell(self, self.base_class, parameters, buffers), *args, **kwargs)

    def own_buffer(self, site: str) -> Tensor:
        """The active adapter's copy of a buffer, which the module may update; of several adapters, their weighted sum."""
        active = self.active(site)
        if len(active) == 1 and active[0][1] == 1.0:
            value: Tensor = active[0][0].value  # type: ignore[assignment]
            return value
        return self.changed(site)
