"""nn.TransformerEncoder and its layers: their fast path reads the weights of the layers inside, which never get called.

PEFT's adapters on linear1, linear2 or self_attn are therefore silently dead in eval mode. While one of the layers inside
has an active change, these run on a twin into whose weights every change is written: the fast path, nested tensors and
the zeros it puts at padded positions stay as they were, and see W + ΔW. In training mode there is no fast path, and the
layers inside are called as usual (and apply their dropout).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from deltaw.core.host import CHILD, FORMS, Host
from deltaw.core.registry import host
from deltaw.core.twin import written_out


class ReadingHost(Host):
    """A module without weights of its own that reads those of the layers inside it."""

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        return False  # of its own it has no weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        whole = self.training or not speaks(self)
        return self.base_class.forward(self if whole else written_out(self), *args, **kwargs)


@host
class TransformerEncoderLayerHost(ReadingHost, nn.TransformerEncoderLayer):
    """A TransformerEncoderLayer with an adapted layer inside."""

    family: ClassVar[str] = "transformer_encoder_layer"
    watches: ClassVar[tuple[type[nn.Module], ...]] = (nn.TransformerEncoderLayer,)


@host
class TransformerEncoderHost(ReadingHost, nn.TransformerEncoder):
    """A TransformerEncoder with an adapted layer inside."""

    family: ClassVar[str] = "transformer_encoder"
    watches: ClassVar[tuple[type[nn.Module], ...]] = (nn.TransformerEncoder,)


def speaks(module: nn.Module) -> bool:
    """Whether a layer inside `module` has an active change, or a weight that is kept in another form."""
    for name, child in module._modules.items():
        if child is not None and name not in (CHILD, FORMS):
            if isinstance(child, Host) and (FORMS in child._modules or child.active_sites()):
                return True
            if speaks(child):
                return True
    return False
