"""A layer family from outside in one file: nn.Bilinear, y = x1ᵀ W x2 + b, with W (out, in1, in2) as an (out, in1·in2) matrix."""

from typing import ClassVar

import torch
from torch import nn

from deltaw.core.host import Example, Host
from deltaw.core.registry import host


@host
class BilinearHost(Host):
    """An adapted nn.Bilinear."""

    family: ClassVar[str] = "bilinear"
    adapts: ClassVar = (nn.Bilinear,)

    @classmethod
    def sites(cls, layer):
        return {"weight": (layer.weight.shape[0], layer.weight[0].numel())}

    def to_matrix(self, site, stored):
        return stored.flatten(1) if site == "weight" else stored

    def from_matrix(self, site, matrix):
        return matrix.view(self.weight.shape) if site == "weight" else matrix

    @classmethod
    def examples(cls):
        def inputs(dtype):
            return torch.randn(2, 5, 3, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)

        yield Example("bilinear", lambda: nn.Bilinear(3, 4, 6), inputs)
        yield Example("no bias", lambda: nn.Bilinear(3, 4, 1, bias=False), inputs)

    def forward(self, left, right):
        bias = None if self.bias is None else self.changed("bias")
        return nn.functional.bilinear(left, right, self.changed("weight"), bias)
