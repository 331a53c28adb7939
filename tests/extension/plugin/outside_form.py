"""A form of the frozen weight from outside in one file: 8-bit floating point with one scale per output."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltaw.core.frozen import Form, FrozenWeight
from deltaw.core.registry import form


@form
@dataclass(frozen=True, kw_only=True, repr=False)
class Float8(Form):
    """float8_e4m3 codes, kept as bytes, with per-row scales."""

    kind: ClassVar[str] = "float8"

    def keep(self, weight):
        return Float8Weight(self, weight)


class Float8Weight(FrozenWeight):
    def __init__(self, form, weight):
        super().__init__(form, weight)
        wide = weight.detach().float()
        scales = wide.abs().amax(1).clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
        self.register_buffer("codes", (wide / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8))
        self.register_buffer("scales", scales)

    def dense(self):
        return (self.codes.view(torch.float8_e4m3fn).float() * self.scales[:, None]).to(self.dtype)

    def matmul(self, x):
        return torch.nn.functional.linear(x, self.dense().to(x.dtype))

    def matmul_grad(self, g):
        return g @ self.dense().to(g.dtype)
