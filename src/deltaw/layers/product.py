"""What nn.Linear and GPT-2's Conv1D have in common: y = x Wᵀ + b, however W is stored.

Low-rank changes go to the fused operation beside the frozen product; any other change goes through W + ΔW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.frozen import FrozenWeight
from deltaw.core.roster import Active
from deltaw.layers.output import Known, OutputHost
from deltaw.ops.grouped import Segment, grouped_linear
from deltaw.ops.linear import adapted_linear
from deltaw.ops.select import is_formed


class ProductHost(OutputHost):
    """A layer that multiplies by its weight's matrix (out, in) and adds a bias."""

    takes_forms: ClassVar[bool] = True
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        weight, form = self.dense_or_form(x)
        sites = self.active_sites()
        if not sites:
            return adapted_linear(x, weight, self.bias, (), training=self.training, frozen=form)
        bias = self.changed_bias() if "bias" in sites else self.bias
        terms = self.low_rank()
        if terms is None and form is None:
            return nn.functional.linear(x, self.as_kept(self.changed("weight")), bias)
        y = adapted_linear(x, weight, bias, terms or (), training=self.training, frozen=form)
        if terms is not None:
            return y
        # over a form, the kept weight's own product and ΔW beside it: a fresh change adds exact zeros
        return y + nn.functional.linear(x, self.to_matrix("weight", self.apart("weight")).to(x.dtype))

    def dense_or_form(self, x: Tensor) -> tuple[Tensor | None, FrozenWeight | None]:
        """The frozen matrix, or the form in which it is kept; one of the two is None."""
        form = self.form_of("weight")
        if form is None:
            return self.to_matrix("weight", self.weight), None
        if torch.compiler.is_compiling() or not is_formed(form.shape[0], form.shape[1]):
            return None, form
        return self.as_kept(self.from_matrix("weight", form.dense())).to(x.dtype), None

    def as_kept(self, stored: Tensor) -> Tensor:
        """The matrix of a weight that lies in memory as the layer's own does: in another order, products round otherwise."""
        own = self._parameters.get("weight")
        if own is None:
            stored = stored.contiguous()
        elif stored.stride() != own.stride():
            stored = torch.empty_like(own, dtype=stored.dtype, requires_grad=False).copy_(stored)
        return self.to_matrix("weight", stored)

    def grouped_call(self, x: Tensor, groups: Sequence[tuple[Active, int, int]]) -> Tensor | None:
        if self.beneath or not self.active_sites(tuple(one for active, *_ in groups for one in active)) <= {"weight"}:
            return None
        segments, known = [], Known()
        for active, start, stop in groups:
            terms = self.low_rank(active, known) if active else []
            if terms is None:
                return None
            segments.append(Segment(start, stop, terms))
        weight, form = self.dense_or_form(x)
        return grouped_linear(x, weight, self.bias, segments, training=self.training, frozen=form)
