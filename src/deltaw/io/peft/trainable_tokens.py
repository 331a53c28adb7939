"""`peft_type: "TRAINABLE_TOKENS"`: chosen rows of embeddings, `<module>.trainable_tokens_delta`, and one list of indices.

A head that is tied to the embedding follows it: its rows are in the file a second time, and it is no target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change, join_key, split_key
from deltaw.errors import AdapterError
from deltaw.io.peft import config as fields
from deltaw.io.peft.claims import Claims
from deltaw.io.peft.grammar import PREFIX, Grammar, Parsed, Shapes, strip_prefix
from deltaw.io.peft.tokens import cannot_tokens, rows_of

SUFFIX = ".trainable_tokens_delta"


class TrainableTokensGrammar(Grammar):
    """Rows, and nothing else."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    kinds: ClassVar[tuple[str, ...]] = ("rows",)

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes = None) -> Parsed:
        notes = fields.check(config, {})
        indices = config.get("token_indices")
        if not isinstance(indices, list) or not all(type(i) is int for i in indices):
            raise AdapterError(f"token_indices must be a list of row numbers, found {str(indices)[:60]}")
        changes = {}
        for key, tensor in strip_prefix(tensors).items():
            path = key.removesuffix(SUFFIX)
            if path == key:
                raise AdapterError(f"{key!r} is no tensor of trainable tokens")
            changes[join_key(path, "weight")] = rows_of(path, tensor, indices)
        claims = Claims.of(config)
        adapter = Adapter(joined(changes, claims), fields.base_of(config), fields.extra_of(config))
        return Parsed(adapter, claims, notes=tuple(notes))

    def cannot(self, adapter: Adapter) -> str | None:
        every: list[Any] = [c.variant for c in adapter.changes.values()]
        if any(v.kind != "rows" for v in every):
            return "it trains chosen rows only"
        if len({v.indices for v in every}) > 1:
            return "one file has one list of rows"
        return cannot_tokens(adapter)

    def write(self, adapter: Adapter, shapes: Shapes = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        first: Any = next(iter(adapter.changes.values())).variant
        config: dict[str, Any] = {
            "peft_type": self.peft_type,
            "inference_mode": True,
            "target_modules": sorted(split_key(k)[0] for k in adapter.changes),
            "token_indices": list(first.indices),
        }
        fields.write_facts(config, adapter)
        written = [(key, c) for name, c in adapter.changes.items() for key in (name, *c.tied)]
        return config, {f"{PREFIX}{split_key(key)[0]}{SUFFIX}": c.tensors["value"] for key, c in written}


def joined(changes: Mapping[str, Change], claims: Claims) -> dict[str, Change]:
    """`changes` where equal rows of a module that the config does not target are those of one that it does."""
    owners = [key for key in changes if claims.targets(split_key(key)[0])]
    found = dict(changes)
    for key in [k for k in changes if k not in owners]:
        value = changes[key].tensors["value"]
        owner = next((k for k in owners if torch.equal(changes[k].tensors["value"], value)), None)
        if owner is not None:
            del found[key]
            found[owner] = replace(found[owner], tied=(*found[owner].tied, key))
    return found


GRAMMAR = TrainableTokensGrammar()
