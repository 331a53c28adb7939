"""`Adapter`: a trained change of a model as a value. Specs and named tensors; no model is needed to hold or change it.

It is the joint of the house: files, combinations, analyses and the store work on it; only `model/` turns it into hosts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltaw.core.unread import Read, stand_in
from deltaw.core.variant import Delta, Dense, Site, Variant, fits
from deltaw.errors import AdapterError, ConfigError

ALIGNMENT = 64
"""Bytes at a multiple of which torch lays its tensors: where they lie elsewhere, kernels may round otherwise."""


@dataclass(frozen=True)
class Change:
    """How one parameter of the base changes.

    variant: the method and its options (for this very weight: rank and alpha are its own).
    tensors: the delta's tensors by their names ("A", "B", ...), in the variant's matrix form, A (rank, in).
    layer: the layer family that the weight belongs to ("linear", "conv1d_gpt2", "embedding", ...); None if a file
        does not say (then the model decides at load).
    shape: the parameter's stored shape in the base, if known.
    tied: names of other parameters that are the same storage in the base, and change with this one.
    """

    variant: Variant
    tensors: Mapping[str, Tensor]
    layer: str | None = None
    shape: tuple[int, ...] | None = None
    tied: tuple[str, ...] = ()

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(out, in) of the weight that this changes, read from the tensors."""
        return self.variant.matrix_shape(self.tensors)

    def delta(self, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Delta:
        """The `Delta` in evaluation mode, on the change's own tensors, or on copies of them in `dtype`.

        shape: of the weight, where the tensors do not tell it.
        """
        cast = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in self.tensors.items()}
        first = next(iter(cast.values()))
        site = Site(shape or self.matrix_shape, first.dtype, torch.device("meta"), buffer=not first.is_floating_point())
        delta = self.variant.create(site, {})
        delta.load_state_dict(cast, assign=True)
        return delta.eval()

    def delta_weight(self, weight: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The dense ΔW (out, in). `weight`: W, for changes that depend on it (DoRA, Full, IA3).

        dtype: the precision to compute in; None: that of its tensors and of `weight`.

        Raises:
            ConfigError: the change depends on W, and it was not given.
            AdapterError: W is of another shape than the change.
        """
        first = next(iter(self.tensors.values()))
        shape = self.matrix_shape if weight is None else tuple(weight.shape)
        if not fits(self.matrix_shape, shape):
            raise AdapterError(f"the change is of a {self.matrix_shape} weight, `weight` is {shape}")
        try:
            if -1 in shape:
                raise Read
            delta = self.delta(dtype, shape)
            with torch.no_grad():
                if weight is None:
                    return delta.delta_weight(stand_in(shape, first)).detach()
                weight = weight.to(first.device, dtype or weight.dtype)
                delta.prepare(Dense(weight))
                return delta.delta_weight(weight).detach()
        except Read:
            raise ConfigError(
                f"ΔW of {self.variant} depends on the base weight, or the weight's shape is needed: pass `weight`"
            ) from None


@dataclass(frozen=True)
class Adapter:
    """A change of a model: `changes` maps the name of a base parameter ("encoder.0.query.weight") to its `Change`.

    base: what is known of the base it was trained on (name, fingerprint), as io/fingerprint.py writes it; may be empty.
    extra: facts that travel with it (label map, task, metrics); JSON values only, never interpreted by the model verbs.
    error: where the adapter is the result of a combination or a truncation: parameter name -> relative Frobenius error
        against the exact ΔW.
    """

    changes: Mapping[str, Change]
    base: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        facts = {k: v for k, v in self.base.items() if k != "fingerprint"}  # that one is long, and made or read as JSON
        json.dumps([facts, dict(self.extra)])  # JSON values only: fails here, not at save

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its full name, "encoder.0.query.weight.A"."""
        return {f"{key}.{name}": t for key, c in self.changes.items() for name, t in c.tensors.items()}

    @property
    def numel(self) -> int:
        """Number of values kept."""
        return sum(t.numel() for t in self.tensors().values())

    def replace(self, **fields: Any) -> Adapter:
        """A copy with some fields replaced."""
        return replace(self, **fields)

    def __repr__(self) -> str:
        kinds = sorted({c.variant.kind for c in self.changes.values()})
        return f"Adapter({len(self.changes)} weights, {'+'.join(kinds) or 'empty'}, {self.numel:,} values)"


def check_adapter(found: object, verb: str) -> None:
    """Refuse what is not an `Adapter`. verb: who asks, for the message.

    Raises:
        ConfigError: it is a path, a model or anything else.
    """
    if not isinstance(found, Adapter):
        raise ConfigError(
            f"{verb} works on adapters as values, not on {type(found).__name__}: use dw.read(path) or dw.get(model, name)"
        )


def split_key(key: str) -> tuple[str, str]:
    """Parameter name -> (module path, site): "a.b.weight" -> ("a.b", "weight"); "weight" -> ("", "weight")."""
    path, _, site = key.rpartition(".")
    return path, site


def join_key(path: str, site: str) -> str:
    """(module path, site) -> parameter name."""
    return f"{path}.{site}" if path else site
