"""Random starts: A random, B zero, so that ΔW = 0. Each takes A (..., rank, in) and B (..., out, rank) and fills them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.core.registry import init
from deltaw.ops.uniform import uniform_


@init("kaiming")
def kaiming(A: Tensor, B: Tensor) -> None:
    """A uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5), what loralib and PEFT use)."""
    inputs = max(1, A.shape[-1])
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6) / math.sqrt(inputs))  # rounded as nn.init.kaiming_uniform_ does
    uniform_(A.detach(), -bound, bound)
    B.detach().zero_()


@init("gaussian")
def gaussian(A: Tensor, B: Tensor) -> None:
    """A standard normal (Hu et al. 2021)."""
    with torch.no_grad():
        A.normal_()
        B.zero_()


@init("gaussian/rank")
def gaussian_by_rank(A: Tensor, B: Tensor) -> None:
    """A normal with standard deviation 1/rank (PEFT's "gaussian")."""
    with torch.no_grad():
        A.normal_(std=1 / A.shape[-2])
        B.zero_()


@init("gaussian/sqrt(rank)")
def gaussian_by_root(A: Tensor, B: Tensor) -> None:
    """A normal with standard deviation 1/sqrt(rank) (S. Raschka's from-scratch code)."""
    with torch.no_grad():
        A.normal_(std=1 / math.sqrt(A.shape[-2]))
        B.zero_()
