"""The host of last resort: any module, its own parameters and buffers changed, its own forward kept.

Whole modules are trained in full (`train=`). A target that names a parameter (targets=["experts.gate_up_proj"]) adapts
that one with any variant: a matrix (out, in), or the stacked weights of a mixture of experts, (E, out, in), or
(E, in, out) where the module says `is_transposed`; every expert has factors of its own, A (E, rank, in), B (E, out, rank).
Where it has no such attribute, (E, out, in) is assumed, as PEFT's files do, and only changes are taken that are of the same
form from both sides (LoRA's).

The forward runs on a shell, a per-call shallow twin with the changed tensors: nothing shared is mutated, so two threads
may use two adapters. It also keeps running statistics still: in training a frozen BatchNorm normalises with the batch,
as it always did, and updates a throw-away copy of its buffers.

A module whose own code reads the weight of a changed layer inside it becomes this host too (see reading.py). Other methods
than forward that read the module's own changed parameters (CLIP's encode_text and its projection) see W + ΔW as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor, nn

from deltaw.core.host import Host
from deltaw.core.registry import host
from deltaw.core.twin import shell
from deltaw.core.variant import Delta
from deltaw.errors import TargetError
from deltaw.layers.reading import Read, other_readers, read_hosts, reads_in, written_in


@host
class ModuleHost(Host):
    """A module of any class with parameters of its own."""

    family: ClassVar[str] = "module"
    full_only: ClassVar[bool] = True

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return True

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """Every parameter that is a matrix or a stack of matrices."""
        return {
            s: tuple(matrix_form(layer, p).shape)
            for s, p in layer._parameters.items()
            if p is not None and p.ndim in (2, 3) and p.is_floating_point()
        }

    @classmethod
    def main_sites(cls, layer: nn.Module) -> tuple[str, ...]:
        return ()

    @classmethod
    def reads_class(cls, kind: type[nn.Module]) -> bool:
        return bool(reads_in(kind))

    @classmethod
    def reads(cls, layer: nn.Module) -> bool:
        return bool(read_hosts(layer))

    def add_delta(self, name: str, site: str, delta: Delta) -> None:
        """As for any host; refused where a vector would lie along the outputs or inputs (DoRA, IA3) and nobody said which
        side of a stack of matrices they are.

        Raises:
            TargetError: that is so.
        """
        shape, vectors = delta.site.shape, [tuple(p.shape) for p in delta._parameters.values() if p is not None]
        torch_own = self.base_class.__module__.startswith("torch.")
        told = len(shape) != 3 or hasattr(self, "is_transposed") or torch_own
        if not told and (shape[:2] in vectors or (shape[0], shape[2]) in vectors):
            raise TargetError(
                f"{delta.variant} treats outputs and inputs differently, and {self.base_class.__name__} does not say "
                f"which side of {site!r} {shape} is which: set its is_transposed before, to False for (E, out, in) or to "
                "True for (E, in, out) (Llama 4's experts), or use dw.LoRA"
            )
        super().add_delta(name, site, delta)

    def bias_of(self, site: str) -> tuple[str, slice | None] | None:
        return None  # what an unknown forward adds its bias to, nobody knows

    def read_inside(self) -> Iterable[Host]:
        return read_hosts(self).values()

    def to_matrix(self, site: str, stored: Tensor) -> Tensor:
        return matrix_form(self, stored)

    def from_matrix(self, site: str, matrix: Tensor) -> Tensor:
        return matrix_form(self, matrix)

    @classmethod
    def methods(cls, base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        return {name: on_twin(function, reads) for name, (function, reads) in other_readers(base).items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites = self.active_sites()
        still = self.training and bool(self._buffers)
        read = {path: layer for path, layer in read_hosts(self).items() if layer.active_sites() or layer.held_names()}
        if not sites and not still and not read:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        parameters: dict[str, Tensor | None] = {
            s: self.changed(s, dropout=self.training) for s in sites if s in self._parameters
        }
        buffers: dict[str, Tensor | None] = {s: self.own_buffer(s) for s in sites if s in self._buffers}
        if still:
            for name, buffer in self._buffers.items():
                if name not in buffers and buffer is not None:
                    buffers[name] = buffer.clone()
        twin = shell(self, self.base_class, parameters, buffers)
        return self.base_class.forward(written_in(twin, read, self.training), *args, **kwargs)

    def own_buffer(self, site: str) -> Tensor:
        """The active adapter's copy of a buffer, which the module may update; of several adapters, their weighted sum."""
        active = self.active_deltas(site)
        if len(active) == 1 and active[0][1] == 1.0:
            value: Tensor = active[0][0].value  # type: ignore[assignment]
            return value
        return self.changed(site)


def on_twin(method: FunctionType, reads: Sequence[Read]) -> Callable[..., Any]:
    """A method that reads parameters as `reads` says (CLIP's encode_text), seeing W + ΔW when it is called by itself."""
    names = {name for read in reads for name in read.path[:1]}

    @functools.wraps(method)
    def call(self: ModuleHost, *args: Any, **kwargs: Any) -> Any:
        sites = names & self._parameters.keys() & self.active_sites() if self.adapters._modules else ()
        if not sites:
            return method(self, *args, **kwargs)
        changed: dict[str, Tensor | None] = {s: self.changed(s, dropout=self.training) for s in sites}
        return method(shell(self, self.base_class, changed), *args, **kwargs)

    return call


def matrix_form(layer: nn.Module, stored: Tensor) -> Tensor:
    """(E, in, out) <-> (E, out, in) for modules that say so, else as stored."""
    return stored.mT if stored.ndim == 3 and bool(getattr(layer, "is_transposed", False)) else stored
