"""AdaLoRA: ΔW = s · B diag(E) A, whose total rank shrinks to a budget while it learns (Zhang et al. 2023, arXiv:2303.10512).

After every optimizer step `dw.after_step(model, step)` measures how much each direction matters (|parameter · gradient|,
smoothed, times its smoothed variability) over all layers of the adapter, and sets E of the least important to zero until
the budget holds. The budget falls from `rank` to `target` per layer along a cubic curve. Skipping `after_step` would train
a plain LoRA of the full rank, so the forward refuses to go on once two optimizer steps went unreported.

s = alpha / (rank + 1e-5), as in the authors' code and in PEFT; it does not change when directions die.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import options
from deltaw.core.registry import variant
from deltaw.core.variant import Delta, FrozenMatrix, LowRank, Site, Variant
from deltaw.errors import AdapterError, ConfigError, ModelError, TargetError

FACTORS = ("A", "B", "E")


@variant
@dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoRA(Variant):
    """LoRA with rank allocation. `dw.after_step(model, step)` must follow every optimizer step, before `zero_grad`.

    rank: directions per layer at the start. target: average number of directions per layer at the end.
    alpha: numerator of the scale; None means 2 x rank.
    total: number of optimizer steps of the whole training; needed to train, not to use what was trained.
    warmup: steps at the start in which nothing is cut. settle: steps at the end in which the allocation is fixed.
    every: steps between two cuts.
    smooth, smooth_spread: how slowly importance and its variability follow the gradients, in (0, 1).
    orthogonality: weight of the penalty that `dw.orthogonality_loss(model)` returns.
    dropout: probability of zeroing, in training, an entry of A's input.

    Raises:
        ConfigError: an option is out of range.
    """

    kind: ClassVar[str] = "adalora"

    rank: int = 12
    target: int = 8
    alpha: float | None = None
    total: int | None = None
    warmup: int = 0
    settle: int = 0
    every: int = 1
    smooth: float = 0.85
    smooth_spread: float = 0.85
    orthogonality: float = 0.5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rank", "target", "every"):
            options.positive_int(name, getattr(self, name))
        if self.alpha is not None:
            options.positive("alpha", self.alpha)
        if self.target > self.rank:
            raise ConfigError(f"target={self.target} is above rank={self.rank}: the rank can only fall")
        for name in ("smooth", "smooth_spread", "dropout"):
            options.probability(name, getattr(self, name))
        for name in ("warmup", "settle"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}: must be a whole number of steps, 0 or more")
        if self.total is not None:
            options.positive_int("total", self.total)
            if self.total <= self.warmup + self.settle:
                raise ConfigError(
                    f"total={self.total} steps leave none between warmup={self.warmup} and settle={self.settle}"
                )
        if not self.orthogonality >= 0:
            raise ConfigError(f"orthogonality={self.orthogonality!r}: must be 0 or above")
        options.boolean("bias", self.bias)

    @property
    def scale(self) -> float:
        """The factor in front of B diag(E) A."""
        return (2.0 * self.rank if self.alpha is None else float(self.alpha)) / (self.rank + 1e-5)

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        return cls(rank=4, target=2, total=100), cls(rank=9, alpha=3, dropout=0.5, bias=True)

    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        if len(site.shape) != 2:
            raise TargetError(f"{self} changes matrices; this weight is a stack {site.shape}: use dw.LoRA for it")
        return AdaLoRADelta(self, site)

    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        A, B, E = (tensors[n] for n in FACTORS)
        if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == self.rank or E.shape != (self.rank,):
            raise AdapterError(
                f"{self}: A must be ({self.rank}, in), B (out, {self.rank}) and E ({self.rank},), found "
                f"{tuple(A.shape)}, {tuple(B.shape)} and {tuple(E.shape)}"
            )
        return B.shape[0], A.shape[1]

    # ---- allocation

    def budget(self, step: int, layers: int) -> int:
        """How many directions all `layers` together may keep after optimizer step `step`, counted from 1."""
        total = self.steps()
        if step <= self.warmup:
            return self.rank * layers
        if step >= total - self.settle:
            return self.target * layers
        left = 1 - (step - self.warmup) / (total - self.settle - self.warmup)
        return int((self.rank - self.target) * layers * left**3 + self.target * layers)

    def steps(self) -> int:
        """`total`, which training cannot do without."""
        if self.total is None:
            raise ModelError(
                f"{self} is trained without the number of steps that its budget falls over: give AdaLoRA(total=...)"
            )
        return self.total

    def after_step(self, deltas: Mapping[str, Delta], step: int) -> None:
        """Measure importance from the gradients that the last step used, and cut to the budget.

        Raises:
            ModelError: `total` is not given, or a gradient is gone (call this before optimizer.zero_grad()).
        """
        trained = {k: d for k, d in deltas.items() if isinstance(d, AdaLoRADelta) and d.E.requires_grad}
        if not trained:
            return
        end = self.steps() - self.settle
        if step < end:
            for key, delta in trained.items():
                delta.measure(key)
        if step == end or (self.warmup < step < end and step % self.every == 0):
            self.cut(trained, self.budget(step, len(trained)))
        elif step > end:
            for delta in trained.values():
                delta.bury()
        for delta in trained.values():
            delta.reported()

    def cut(self, deltas: Mapping[str, AdaLoRADelta], budget: int) -> None:
        """Set E to zero but for the `budget` most important directions of all layers."""
        scores = torch.cat([d.importance() for d in deltas.values()])
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[scores.argsort(descending=True, stable=True)[:budget]] = True
        for delta, alive in zip(deltas.values(), keep.view(-1, self.rank)):
            delta.alive = alive.clone()
            delta.bury()


class AdaLoRADelta(Delta):
    """A (rank, in), B (out, rank) and E (rank,); while training also each one's importance and its spread, and `alive`."""

    fast = ("B",)
    variant: AdaLoRA
    alive: Tensor
    seen: tuple[int, int] | None

    def __init__(self, variant: AdaLoRA, site: Site) -> None:
        super().__init__(variant, site)
        self.A = nn.Parameter(torch.empty(variant.rank, site.columns, dtype=site.dtype, device=site.device))
        self.B = nn.Parameter(torch.empty(site.rows, variant.rank, dtype=site.dtype, device=site.device))
        self.E = nn.Parameter(torch.empty(variant.rank, dtype=site.dtype, device=site.device))
        self.seen = None
        self.unreported = 0

    def start(self, frozen: FrozenMatrix) -> None:
        with torch.no_grad():
            self.A.normal_(std=0.02)
            self.B.normal_(std=0.02)
            self.E.zero_()
        self.prepare(frozen)

    def prepare(self, frozen: FrozenMatrix) -> None:
        """What only training needs: kept by checkpoints, not by adapter files."""
        for name in FACTORS:
            parameter = getattr(self, name)
            self.register_buffer(f"importance_{name}", torch.zeros_like(parameter, requires_grad=False))
            self.register_buffer(f"spread_{name}", torch.zeros_like(parameter, requires_grad=False))
        self.register_buffer("alive", torch.ones_like(self.E, dtype=torch.bool, requires_grad=False))
        self.seen, self.unreported = None, 0

    def kept(self) -> tuple[Variant, dict[str, Tensor]]:
        found = self.state_dict(keep_vars=True)
        return self.variant, {name: found[name] for name in FACTORS}

    def hot(self, variant: Variant, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another scale goes into E. What only training needs starts anew (`prepare`), as after loading."""
        if not isinstance(variant, AdaLoRA) or variant.rank != self.variant.rank:
            raise AdapterError(f"{variant} does not fit into the place of {self.variant}: same method and rank")
        rest = {name: t for name, t in self.state_dict().items() if name not in FACTORS}
        E = tensors["E"] * (variant.scale / self.variant.scale)
        return super().hot(self.variant, {**rest, **tensors, "E": E})

    # ---- the change

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.variant.scale * (self.B @ (self.E[:, None] * self.A))

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...]:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.check_reported()
        v = self.variant
        return (LowRank(self.E[:, None] * self.A, self.B, v.scale, None, v.dropout),)

    def check_reported(self) -> None:
        """Refuse to train on when E changed twice between forwards and `after_step` was told of neither change.

        E also changes when a checkpoint is put back or a user sets it, but then once.
        """
        if not self.E.requires_grad:
            return
        now = (id(self.E), self.E._version)
        if self.seen is not None and now != self.seen:
            self.unreported += 1
        self.seen = now
        if self.unreported >= 2:
            raise ModelError(
                "AdaLoRA is trained without its rank allocation: call dw.after_step(model, step) after every "
                "optimizer.step(), before optimizer.zero_grad()"
            )

    # ---- allocation

    def reported(self) -> None:
        """`after_step` was called for this state."""
        self.seen, self.unreported = (id(self.E), self.E._version), 0

    def measure(self, key: str) -> None:
        """Smooth |parameter · gradient| and its distance from the smoothed value."""
        v = self.variant
        with torch.no_grad():
            for name in FACTORS:
                parameter = getattr(self, name)
                if parameter.grad is None:
                    raise ModelError(
                        f"dw.after_step: {key}.{name} has no gradient; call it after optimizer.step() and before "
                        f"optimizer.zero_grad()"
                    )
                now = (parameter * parameter.grad).abs()
                importance, spread = getattr(self, f"importance_{name}"), getattr(self, f"spread_{name}")
                importance.mul_(v.smooth).add_(now, alpha=1 - v.smooth)
                spread.mul_(v.smooth_spread).add_((now - importance).abs(), alpha=1 - v.smooth_spread)

    def importance(self) -> Tensor:
        """Of each direction, (rank,): of its E, and the mean over its row of A and its column of B."""
        A, B, E = (getattr(self, f"importance_{n}") * getattr(self, f"spread_{n}") for n in FACTORS)
        score: Tensor = E + A.mean(1) + B.mean(0)
        return score

    def bury(self) -> None:
        """Keep the directions dead that were cut."""
        with torch.no_grad():
            self.E.mul_(self.alive)


def orthogonality_loss(model: nn.Module) -> Tensor | float:
    """The penalty that keeps AdaLoRA's A and B near orthonormal; add it to the loss. 0 if the model trains no AdaLoRA.

    weight · mean over all A and B of ‖AAᵀ - I‖ or ‖BᵀB - I‖ (Frobenius), as in the authors' code and in PEFT.
    """
    terms: list[Tensor] = []
    for delta in model.modules():
        if isinstance(delta, AdaLoRADelta) and delta.A.requires_grad:
            eye = torch.eye(delta.variant.rank, dtype=delta.A.dtype, device=delta.A.device)
            for gram in (delta.A @ delta.A.T, delta.B.T @ delta.B):
                terms.append(delta.variant.orthogonality * torch.linalg.matrix_norm(gram - eye))
    return torch.stack(terms).mean() if terms else 0.0
