"""`peft_type: "DELTAW"`: deltaw's own words, for whatever PEFT's cannot say. PEFT rejects the type instead of misreading it.

The config lists the variants with their options and, for every changed parameter, which of them it has, its layer's
family and its stored shape. Tensors are named `<parameter>.<tensor>` ("encoder.0.query.weight.A"). Tensors that several
parameters share (VeRA's random matrices) are kept once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change
from deltaw.errors import AdapterError, DeltawError
from deltaw.io.manifest import build_variant, describe
from deltaw.io.peft import config as fields
from deltaw.io.peft.grammar import Grammar, Parsed, Shapes

VERSION = 1
WORTH_SHARING = 4096
"""Values in a tensor from which equal ones are kept once."""


class NativeGrammar(Grammar):
    """Says every adapter of every registered variant."""

    peft_type: ClassVar[str] = "DELTAW"
    kinds: ClassVar[tuple[str, ...]] = ()

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes = None) -> Parsed:
        if config.get("format") != VERSION:
            raise AdapterError(
                f"deltaw's grammar has version {config.get('format')!r} here; this deltaw reads {VERSION}"
            )
        described, entries, shared = (config.get(n) for n in ("variants", "changes", "shared"))
        shared = {} if shared is None else shared
        if not isinstance(described, list) or not isinstance(entries, dict) or not isinstance(shared, dict):
            raise AdapterError("variants, changes or shared in the config are not what deltaw writes")
        known = [build_variant(v) for v in described]
        used: set[str] = set()

        def take(name: str) -> Tensor:
            source = shared.get(name, name)
            if not isinstance(source, str) or source not in tensors:
                raise AdapterError(f"the tensor {name!r} is missing")
            used.add(source)
            return tensors[source]

        changes: dict[str, Change] = {}
        for key, entry in entries.items():
            try:
                index, layer, shape, names, tied = entry
                variant = known[index] if type(index) is int and index >= 0 else None
                shape = None if shape is None else tuple(shape)
                good = (
                    variant is not None
                    and (layer is None or isinstance(layer, str))
                    and isinstance(names, list)
                    and isinstance(tied, list)
                )
                good = (
                    good
                    and all(isinstance(n, str) for n in [*names, *tied])
                    and all(type(n) is int for n in shape or ())
                )
            except (TypeError, ValueError, IndexError):
                good = False
            if not good or not names:
                raise AdapterError(f"the config's entry of {key!r} is not what deltaw writes")
            assert variant is not None
            change = Change(variant, {n: take(f"{key}.{n}") for n in names}, layer, shape, tuple(tied))
            try:
                _ = change.matrix_shape
            except (DeltawError, KeyError, ValueError, IndexError, TypeError) as error:
                raise AdapterError(f"{key!r}: {error}") from error
            changes[key] = change
        unused = sorted(set(tensors) - used)
        if unused:
            raise AdapterError(f"the file holds the tensor {unused[0]!r}, which its config does not mention")
        stray = sorted(n for n in shared if n.rpartition(".")[0] not in changes)
        if stray:
            raise AdapterError(f"shared names {stray[0]!r}, which is no tensor of a change")
        return Parsed(Adapter(changes, fields.base_of(config), fields.extra_of(config)))

    def cannot(self, adapter: Adapter) -> str | None:
        return None

    def write(self, adapter: Adapter, shapes: Shapes = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        variants: list[dict[str, Any]] = []
        changes: dict[str, Any] = {}
        kept: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        for key, change in sorted(adapter.changes.items()):
            described = describe(change.variant)
            if described not in variants:
                variants.append(described)
            shape = None if change.shape is None else list(change.shape)
            changes[key] = [variants.index(described), change.layer, shape, sorted(change.tensors), list(change.tied)]
            for name, tensor in sorted(change.tensors.items()):
                full = f"{key}.{name}"
                before = first.setdefault(_likeness(tensor, full), full)
                if before != full and torch.equal(kept[before], tensor):
                    shared[full] = before
                else:
                    kept[full] = tensor
        config: dict[str, Any] = {
            "peft_type": self.peft_type,
            "format": VERSION,
            "variants": variants,
            "changes": changes,
        }
        fields.put(config, "shared", shared, {})
        fields.write_facts(config, adapter)
        return config, kept


def _likeness(tensor: Tensor, name: str) -> tuple[Any, ...]:
    """What equal tensors have in common; small ones are like nothing else."""
    if tensor.numel() < WORTH_SHARING:
        return (name,)
    flat = tensor.reshape(-1)
    return (tuple(tensor.shape), tensor.dtype, *flat[:: max(1, flat.numel() // 8)][:8].tolist())


GRAMMAR = NativeGrammar()
