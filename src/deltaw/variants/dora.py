"""DoRA: learn length and direction apart (Liu et al. 2024, arXiv:2402.09353).

W' = m / ‖W + scale·BA‖ · (W + scale·BA), row by row: m (out,) is trained, the norm is a constant for the gradient (the
paper's section 4.3). m starts as the very norm that the forward computes, so c = m/norm = 1 exactly and nothing changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.registry import variant
from deltaw.core.variant import Delta, Dense, FrozenMatrix, LowRank, Site
from deltaw.errors import AdapterError
from deltaw.ops.dora import row_norms, row_norms_of, row_squares
from deltaw.ops.matmul import readable
from deltaw.variants.lora import LoRA, LoRADelta


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA for the direction of every row of W, a trained vector m for its length.

    Options as LoRA's. A row of W that is zero stays what LoRA makes of it (its length has no direction to scale).
    """

    kind: ClassVar[str] = "dora"

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return DoRADelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        shape = super().matrix_shape(tensors)
        if tuple(tensors["m"].shape) != shape[:-1]:
            raise AdapterError(f"{self}: m must be {shape[:-1]}, found {tuple(tensors['m'].shape)}")
        return shape


class DoRADelta(LoRADelta):
    """A, B and the row lengths m (out,). `squares` keeps ‖W‖² per row, of the W that `measured` tells."""

    squares: Tensor | None
    measured: Hashable

    def __init__(self, variant: DoRA, site: Site) -> None:
        super().__init__(variant, site)
        self.m = nn.Parameter(torch.empty(site.shape[:-1], dtype=site.dtype, device=site.device))
        self.register_buffer("squares", None, persistent=False)
        self.__dict__["measured"] = None

    def start(self, frozen: FrozenMatrix) -> None:
        super().start(frozen)
        self.measure(frozen)

    def begin(self, frozen: FrozenMatrix, seen: Tensor) -> None:
        super().begin(frozen, seen)
        self.measure(frozen)

    def measure(self, frozen: FrozenMatrix) -> None:
        """Let m be the very norms that the forward computes."""
        with torch.no_grad():
            self.prepare(frozen)
            self.m.copy_(self.norms(frozen, self.squares))

    def prepare(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            self.squares = row_squares(frozen.dense().to(self.site.dtype))
            self.__dict__["measured"] = frozen.state()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "measured": None}

    def squares_of(self, frozen: FrozenMatrix) -> Tensor:
        """‖W‖² per row, (out,): what was kept, if W is still the same; anew where W is trained. Compiled code takes what was
        kept of a frozen W."""
        if frozen.trained:
            self.measured = None
            return row_squares(frozen.dense().to(self.site.dtype))
        if self.squares is not None and torch.compiler.is_compiling():
            return self.squares
        state = frozen.state()
        if self.squares is not None and state is not None and state == self.measured:
            return self.squares
        if state is not None and frozen.lasting:
            self.prepare(frozen)
            assert self.squares is not None
            return self.squares
        return row_squares(frozen.dense().to(self.site.dtype))

    def norms(self, frozen: FrozenMatrix, squares: Tensor | None = None) -> Tensor:
        """‖W + scale·BA‖ per row, (out,), by factors: no dense BA is formed. Not differentiated.

        squares: ‖W‖² per row, where the caller has just taken it.
        """
        with torch.no_grad():
            squares = self.squares_of(frozen) if squares is None else squares
            A, B = self.factors()
            if A.ndim == 2 and isinstance(frozen, Dense):
                return row_norms_of(frozen.weight, squares, A, B, self.variant.scale).detach()
            product = frozen.factor_matmul(A) if A.ndim == 2 else A @ frozen.dense().to(A.dtype).mT  # (rank, out)
            return row_norms(squares, product, A, B, self.variant.scale).detach()  # of forward-mode derivatives too

    def strengths(self, frozen: FrozenMatrix) -> Tensor:
        """c = m / norm, (out,); 1 where the norm is zero."""
        norms = self.norms(frozen)
        if norms.device.type == "cpu" and readable() and norms.numel() and float(norms.min()) > 0:
            return self.m / norms
        alive = norms > 0
        return torch.where(alive, self.m / torch.where(alive, norms, torch.ones_like(norms)), torch.ones_like(norms))

    def delta_weight(self, weight: Tensor) -> Tensor:
        c, present = self.strengths(Dense(weight))[..., None], self.presence()
        gain = c - 1 if present is None else (c - 1) * present
        return gain * weight + c * self.dense(present)

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...] | None:
        """c B is taken in A's precision: in a model that was cast after attach, c alone is still of 32 bit."""
        c, present = self.strengths(frozen), self.presence()
        first, *rest = (t._replace(B=(c[..., None] * t.B).to(t.A.dtype)) for t in self.terms(present))
        return (first._replace(gain=c - 1 if present is None else (c - 1) * present), *rest)
