"""What the laws run over: every registered (layer x variant), with the awkward instances that each file brings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw.core.host import Example, Host
from deltaw.core.registry import hosts, variants
from deltaw.core.variant import Variant
from deltaw.model.attach import attach
from deltaw.ops import select


@pytest.fixture(autouse=True, params=["fused", "composed"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """No shape is too small for the fused operation and for factors, or every one is."""
    for limit in ("SMALL", "LIGHT", "FORMED", "KERNEL"):
        monkeypatch.setattr(select, limit, -1 if request.param == "fused" else 1 << 62)
    return str(request.param)


def layer_examples() -> list[tuple[str, type[Host], Example]]:
    """(family, host, example) of every registered layer family."""
    return [(family, cls, example) for family, cls in hosts.items() for example in cls.examples()]


def variant_examples() -> list[Variant]:
    """Every example of every registered variant."""
    return [example for _, cls in variants.items() for example in cls.examples()]


def cases() -> list:
    """Every combination of a layer's example with a variant's, as pytest parameters."""
    return [
        pytest.param(example, variant, id=f"{family}/{example.label}-{variant!r}".replace(" ", ""))
        for family, _, example in layer_examples()
        for variant in variant_examples()
    ]


class Wrapped(nn.Module):
    """A model around one layer, so that it has a path: `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def flat(output: object) -> list[torch.Tensor]:
    """The tensors of an output: a tensor, a tuple of them, packed sequences."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, torch.nn.utils.rnn.PackedSequence):
        return [output.data]
    if isinstance(output, (tuple, list)):
        return [t for o in output for t in flat(o)]
    return []


def built(example: Example, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Wrapped, tuple]:
    """The example's layer in a model, and the arguments of its call, both from `seed`."""
    torch.manual_seed(seed)
    return Wrapped(example.layer()).to(dtype), example.args(dtype)


def adapted(model: nn.Module, variant: Variant, name: str = "default") -> nn.Module:
    """`model` with its layer adapted; skips the test where the two refuse each other, saying why."""
    from deltaw.errors import TargetError

    try:
        return attach(model, variant, targets=["layer"], name=name)
    except TargetError as refused:
        pytest.skip(f"refused at attach, as it should be: {refused}")


def shaken(model: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    """`model` after a random step of every trainable tensor, so that the change is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def twin(model: nn.Module) -> nn.Module:
    """A deep copy."""
    return copy.deepcopy(model)
