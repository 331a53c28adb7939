"""`peft_type: "TRAINABLE_TOKENS"`: chosen rows of embeddings, `<module>.trainable_tokens_delta`, and one list of indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Adapter, join_key, split_key
from deltaw.errors import AdapterError
from deltaw.io.peft import config as fields
from deltaw.io.peft.claims import Claims
from deltaw.io.peft.grammar import PREFIX, Grammar, Parsed, Shapes, strip_prefix
from deltaw.io.peft.tokens import rows_of

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
        adapter = Adapter(changes, fields.base_of(config), fields.extra_of(config))
        return Parsed(adapter, Claims.of(config), notes=tuple(notes))

    def cannot(self, adapter: Adapter) -> str | None:
        every: list[Any] = [c.variant for c in adapter.changes.values()]
        if any(v.kind != "rows" for v in every):
            return "it trains chosen rows only"
        if len({v.indices for v in every}) > 1:
            return "one file has one list of rows"
        if any(split_key(k)[1] != "weight" or not split_key(k)[0] for k in adapter.changes):
            return "it trains rows of modules' weights"
        return None

    def write(self, adapter: Adapter, shapes: Shapes = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        first: Any = next(iter(adapter.changes.values())).variant
        paths = {split_key(k)[0]: c for k, c in adapter.changes.items()}
        config: dict[str, Any] = {
            "peft_type": self.peft_type,
            "inference_mode": True,
            "target_modules": sorted(paths),
            "token_indices": list(first.indices),
        }
        fields.write_facts(config, adapter)
        return config, {f"{PREFIX}{path}{SUFFIX}": c.tensors["value"] for path, c in paths.items()}


GRAMMAR = TrainableTokensGrammar()
