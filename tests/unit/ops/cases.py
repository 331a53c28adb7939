"""Random adapters and layers for the tests of `deltaw.ops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaw.core.variant import LowRank


@dataclass
class Case:
    """One call of the adapted linear: shapes, and which parts there are."""

    lead: tuple[int, ...] = (7,)
    width: int = 5
    out: int = 4
    rank: int = 3
    bias: bool = True
    gain: bool = False
    dropout: float = 0.0
    at: str = "input"
    count: int = 1
    dtype: torch.dtype = torch.float64
    seed: int = 0
    tensors: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype).requires_grad_()

        self.tensors = [noise(*self.lead, self.width), noise(self.out, self.width)]
        if self.bias:
            self.tensors.append(noise(self.out))
        for _ in range(self.count):
            self.tensors += [noise(self.rank, self.width), noise(self.out, self.rank)]
            if self.gain:
                self.tensors.append(noise(self.out))

    def run(
        self, op: Callable[..., Tensor], tensors: tuple[Tensor, ...] | None = None, training: bool = True
    ) -> Tensor:
        """`op` on these tensors (or others in their place), the generator set anew so that dropout is the same."""
        x, weight, *rest = self.tensors if tensors is None else tensors
        bias = rest.pop(0) if self.bias else None
        step = 3 if self.gain else 2
        adapters = [
            LowRank(rest[i], rest[i + 1], 0.7, rest[i + 2] if self.gain else None, self.dropout, self.at)
            for i in range(0, len(rest), step)
        ]
        if not torch.compiler.is_compiling():
            torch.manual_seed(11)
        return op(x, weight, bias, adapters, training=training)

    def gradients(self, op: Callable[..., Tensor], probe: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, and the gradient of every tensor for the same random cotangent."""
        y = self.run(op)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
        return y, list(torch.autograd.grad((y * noise).sum(), self.tensors))
