"""How A and B start where shapes alone do not say it: a `Start` looks at the weight, at data, or at the unquantised weight.

Some papers (PiSSA, OLoRA, MiLoRA, CorDA, LoRA-GA) start with ΔW = s·B₀A₀ ≠ 0 and take it away from the base. Here the base
is never touched: the change is s·(BA − B₀A₀), A₀ and B₀ frozen, so that a fresh adapter changes nothing (up to rounding)
and the plain base stays the base. What a file keeps is one plain LoRA with the factors [A; A₀] and [B, −B₀].

A plain random start is a function of (A, B) that fills both in place; see `deltaw.inits.random`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltaw.core.variant import FrozenMatrix

LooksAt = Literal["shape", "weight", "inputs", "gradient", "original"]
"""What a start needs: nothing, the frozen weight, the inputs of the layer, the loss's gradient of the weight, or the
weight before it was quantised. The last three come from `dw.initialize`."""


class Observer(ABC):
    """Takes in what one layer sees, batch by batch, in bounded memory."""

    @abstractmethod
    def see(self, rows: Tensor) -> None:
        """`rows`: inputs (tokens, in), or one gradient (out, in)."""

    @abstractmethod
    def result(self) -> Tensor:
        """What was seen, in the form that the start's `factors` takes."""


class Start(ABC):
    """One rule for A and B. Registered by name with `@init(name)`, as an instance."""

    looks_at: ClassVar[LooksAt]
    offset: ClassVar[bool] = False
    """True if s·BA is not zero at the start and is taken away by a frozen copy."""
    exact: ClassVar[bool] = True
    """True if a fresh adapter changes no bit; else it changes nothing up to rounding."""

    @abstractmethod
    def factors(self, weight: Tensor, rank: int, scale: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) for the weight W (out, in), given in fp32 or wider.

        scale: s of ΔW = s·BA. seen: the observer's result; the original weight (out, in); or None.

        Raises:
            ConfigError: the rank does not suit this weight.
        """

    def observer(self, rank: int) -> Observer:
        """A fresh observer for one weight; only for starts that look at inputs or gradients."""
        raise NotImplementedError(type(self).__name__)

    def shares(self, seen: Tensor) -> Tensor | None:
        """How much of all that was seen each direction explains, largest first, (k,); None if ranks are not to be shared out."""
        return None


class Waiting(ABC):
    """A delta whose start may look at data: `dw.initialize` finds these and gives them what they look at.

    waiting: True until `begin`, if the start looks at data.
    """

    waiting: bool

    @property
    @abstractmethod
    def awaits(self) -> Start | None:
        """The start that still needs data, or None."""

    @property
    @abstractmethod
    def directions(self) -> int:
        """The rank."""

    @abstractmethod
    def resize(self, rank: int) -> None:
        """Take another rank at the same scale, before `begin`. The trained tensors become new ones."""

    @abstractmethod
    def begin(self, frozen: FrozenMatrix, seen: Tensor) -> None:
        """Start now, from what was seen."""


def as_wide(weight: Tensor, like: torch.dtype = torch.float32) -> Tensor:
    """`weight` in fp32, or in fp64 if it or `like` is."""
    return weight.detach().to(torch.promote_types(torch.promote_types(weight.dtype, like), torch.float32))


def start_of(rule: Any) -> Start | None:
    """`rule` if it is a `Start`, None if it is a plain random function."""
    return rule if isinstance(rule, Start) else None
