"""LoRA: W + scale · B A, with A (rank, in), B (out, rank) (Hu et al. 2021, arXiv:2106.09685).

B starts at zero, so a fresh adapter changes nothing. `scale` follows one of three rules: alpha/rank (the paper),
alpha/sqrt(rank) (rsLoRA, arXiv:2312.03732), or plain alpha (S. Raschka's from-scratch code). Starts that are not zero
(PiSSA ...) carry a frozen copy (A0, B0 = -B at the start) that takes the start away again; see `deltaw.core.starting`.
A stack of E expert weights (E, out, in) has its own factors per expert: A (E, rank, in), B (E, out, rank).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import inits, variant
from deltaw.core.starting import Start, Waiting, as_wide, start_of
from deltaw.core.variant import Delta, FrozenMatrix, LowRank, Site, Variant
from deltaw.errors import AdapterError, ModelError
from deltaw.ops.rank_dropout import keep_all, keep_ranks

SCALINGS = ("alpha/rank", "alpha/sqrt(rank)", "alpha")


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(Variant):
    """Low-rank adaptation, ΔW = scale · B A.

    rank: number of directions that may change.
    alpha: numerator of the scale; None means 2 x rank.
    scaling: "alpha/rank", "alpha/sqrt(rank)" or "alpha".
    init: how A and B start ("kaiming" as PEFT; "gaussian"; "pissa", "olora", "eva" ...: all of `deltaw.inits`).
    dropout: probability of zeroing, in training, an entry of A's input, or of the change's output with dropout_at="output".
    rank_dropout: probability of leaving out each of the directions in one training call (the others grow by 1/(1-p)).
    module_dropout: probability of leaving out the whole change in one training call (nothing grows, as in LyCORIS).

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "lora"
    only_training: ClassVar[tuple[str, ...]] = (
        "bias",
        "init",
        "dropout",
        "dropout_at",
        "rank_dropout",
        "module_dropout",
    )

    rank: int = 8
    alpha: float | None = None
    scaling: str = "alpha/rank"
    init: str = "kaiming"
    dropout: float = 0.0
    dropout_at: str = "input"
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        options.positive_int("rank", self.rank)
        if self.alpha is not None:
            options.positive("alpha", self.alpha)
        options.one_of("scaling", self.scaling, SCALINGS)
        options.one_of("dropout_at", self.dropout_at, ("input", "output"))
        for name in ("dropout", "rank_dropout", "module_dropout"):
            options.probability(name, getattr(self, name))
        options.boolean("bias", self.bias)
        _ = inits[self.init]

    @property
    def scale(self) -> float:
        """The factor in front of B A."""
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        if self.scaling == "alpha":
            return alpha
        return alpha / (self.rank if self.scaling == "alpha/rank" else math.sqrt(self.rank))

    @property
    def rewrites_base(self) -> bool:
        """True if a fresh adapter changes nothing only up to rounding."""
        start = start_of(inits[self.init])
        return start is not None and (start.offset or not start.exact)

    def ranked(self, rank: int) -> LoRA:
        """The same scale at another rank."""
        if self.scaling == "alpha/rank":
            return replace(self, rank=rank, alpha=None if self.alpha is None else self.alpha * rank / self.rank)
        return replace(self, rank=rank, alpha=self.scale, scaling="alpha")

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return (
            cls(rank=3, alpha=5),
            cls(rank=40, scaling="alpha/sqrt(rank)", init="gaussian", bias=True),
            cls(rank=1, alpha=0.5, scaling="alpha", init="gaussian/sqrt(rank)", dropout=0.5, dropout_at="output"),
            cls(rank=2, init="pissa", rank_dropout=0.5, module_dropout=0.5),
        )

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        return LoRADelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        A, B = tensors["A"], tensors["B"]
        if (
            A.ndim not in (2, 3)
            or A.ndim != B.ndim
            or A.shape[:-2] != B.shape[:-2]
            or A.shape[-2] != self.rank
            or B.shape[-1] != self.rank
        ):
            raise AdapterError(
                f"{self}: A must be ({self.rank}, in) and B (out, {self.rank}), found {tuple(A.shape)} and {tuple(B.shape)}"
            )
        return (*A.shape[:-2], B.shape[-2], A.shape[-1])


class LoRADelta(Delta, Waiting):
    """A (rank, in) and B (out, rank) of one weight, and after a start that is not zero A0 and B0 of the same shapes."""

    fast = ("B",)
    variant: LoRA
    A: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, variant: LoRA, site: Site) -> None:
        super().__init__(variant, site)
        *stack, out, columns = site.shape
        A = torch.empty(*stack, variant.rank, columns, dtype=site.dtype, device=site.device)
        B = torch.empty(*stack, out, variant.rank, dtype=site.dtype, device=site.device)
        self._parameters.update(A=nn.Parameter(A), B=nn.Parameter(B))
        self._buffers.update(A0=None, B0=None)
        self.__dict__["waiting"] = False

    # ---- the start

    def start(self, frozen: FrozenMatrix) -> None:
        rule = inits[self.variant.init]
        start = start_of(rule)
        if start is None and self.site.lookup and isinstance(self.A, nn.Parameter):
            # A call meets single columns of A: if those were random and B zero, every step of B would move all tokens
            # (the padding too) by what belongs to few. So A starts at zero and B at random, normal by default as PEFT's.
            rule = inits["gaussian"] if self.variant.init == "kaiming" else rule
            rule(self.B.mT, self.A.mT)
        elif start is None:
            rule(self.A, self.B)
        elif start.looks_at in ("shape", "weight"):
            self.fill(start, frozen, None)
        else:
            inits["kaiming"](self.A, self.B)
            self.waiting = True
            if start.offset:
                self.take_away()

    @property
    def awaits(self) -> Start | None:
        start = start_of(inits[self.variant.init])
        return start if start is not None and start.looks_at not in ("shape", "weight") else None

    @property
    def directions(self) -> int:
        return self.variant.rank

    def resize(self, rank: int) -> None:
        if rank == self.variant.rank:
            return
        self.variant = self.variant.ranked(rank)
        trained = self.B.requires_grad
        self.A = nn.Parameter(self.A.new_zeros(*self.A.shape[:-2], rank, self.A.shape[-1]), trained)
        self.B = nn.Parameter(self.B.new_zeros(*self.B.shape[:-1], rank), trained)

    def begin(self, frozen: FrozenMatrix, seen: Tensor) -> None:
        start = self.awaits
        assert start is not None
        self.fill(start, frozen, seen)
        self.waiting = False

    def fill(self, start: Start, frozen: FrozenMatrix, seen: Tensor | None) -> None:
        """Set A and B by `start`, and A0 and B0 if it is not zero."""
        with torch.no_grad():
            weight = as_wide(frozen.dense(), self.site.dtype)
            A, B = start.factors(weight, self.variant.rank, self.variant.scale, seen)
            self.A.copy_(A)
            self.B.copy_(B)
            if start.offset:
                self.take_away()

    def take_away(self) -> None:
        """Remember the start, so that the change is s·(BA - its start)."""
        self.A0, self.B0 = self.A.detach().clone(), -self.B.detach()

    def check_begun(self) -> None:
        """Refuse training with a start that waits for data. Called while it waits."""
        if self.training and torch.is_grad_enabled():
            if bool(self.B.any()):  # a checkpoint was put back
                self.waiting = False
                return
            raise ModelError(
                f"init={self.variant.init!r} looks at data first: call dw.initialize(model, batches) before training"
            )

    # ---- the change

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k) with ΔW = s·BA: k is the rank, or twice that with a start to take away."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0], dim=-2), torch.cat([self.B, self.B0], dim=-1)

    def pairs(self, present: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of every term, under rank dropout in training. present: 1 or 0, what `presence` drew for this call."""
        if self.waiting:
            self.check_begun()
        found: list[tuple[Tensor, Tensor]] = [(self.A, self.B)]
        A0, B0 = self._buffers["A0"], self._buffers["B0"]
        if A0 is not None and B0 is not None:
            found.append((A0, B0))
        v = self.variant
        if self.training and v.rank_dropout:
            keep = keep_ranks(v.rank, v.rank_dropout, self.B)
            found = [(A, B * keep) for A, B in found]
        return found if present is None else [(A, B * present) for A, B in found]

    def presence(self) -> Tensor | None:
        """1, or 0 where module dropout leaves this change out of a training call; None without module dropout."""
        p = self.variant.module_dropout
        return keep_all(p, self.B) if self.training and p else None

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.dense(self.presence())

    def dense(self, present: Tensor | None) -> Tensor:
        """scale · B A (and the start taken away), (..., out, in)."""
        first, *rest = (B @ A for A, B in self.pairs(present))
        return self.variant.scale * sum(rest, first)

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...] | None:
        return self.terms(self.presence())

    def terms(self, present: Tensor | None) -> tuple[LowRank, ...]:
        """The change in the form of the fused operations."""
        v = self.variant
        (A, B), *rest = self.pairs(present)
        term = LowRank(A, B, v.scale, None, v.dropout, v.dropout_at)
        return (term, *(LowRank(A0, B0, v.scale) for A0, B0 in rest))

    def hot(self, variant: Variant, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A smaller rank is filled up with zeros; another scale goes into B. The change stays what it was."""
        rank = self.variant.rank
        if type(variant) is not type(self.variant) or not isinstance(variant, LoRA) or variant.rank > rank:
            raise AdapterError(
                f"{variant} does not fit into the place of {self.variant}: same method, and rank at most {rank}"
            )
        A, B = tensors["A"], tensors["B"]
        more, factor = rank - variant.rank, variant.scale / self.variant.scale
        A = torch.cat([A, A.new_zeros(*A.shape[:-2], more, A.shape[-1])], dim=-2)
        B = torch.cat([B if factor == 1 else B * factor, B.new_zeros(*B.shape[:-1], more)], dim=-1)
        found = {**tensors, "A": A, "B": B}
        for name in ("A0", "B0"):  # what was taken away from the start is no part of the newcomer
            mine = getattr(self, name)
            if mine is not None:
                found.setdefault(name, torch.zeros_like(mine))
        plain = replace(variant, rank=rank, alpha=self.variant.alpha, scaling=self.variant.scaling)
        return super().hot(plain, found)

    def kept(self) -> tuple[Variant, dict[str, Tensor]]:
        if self.A0 is None:
            return super().kept()
        A, B = self.factors()
        rest = {k: t for k, t in self.state_dict(keep_vars=True).items() if k not in ("A", "B", "A0", "B0")}
        return replace(self.variant.ranked(2 * self.variant.rank), init="kaiming"), {"A": A, "B": B, **rest}
