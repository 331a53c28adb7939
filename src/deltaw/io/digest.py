"""The identity of an adapter: sha256 over what it does, whatever file it came in.

Two files with the same digest change every model in the same way. What only training knew (dropout, how A and B started)
is left out; a scale counts by its value, not by the rule that made it. The digest names store entries, cache keys and
served versions.
"""

from __future__ import annotations

import hashlib
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.core.variant import Variant
from deltaw.io import strict_json, tensor_file

TRAINING_NOTES = frozenset(
    {"dropout", "dropout_at", "rank_dropout", "module_dropout", "init", "bias", "seed", "d"}
    | {"target", "total", "warmup", "settle", "every", "smooth", "smooth_spread", "orthogonality"}
)
"""Options that a trained change no longer depends on."""


def digest(adapter: Adapter) -> str:
    """`"sha256:<64 hex digits>"` of the adapter's changes."""
    state = hashlib.sha256()
    said: dict[int, dict[str, Any]] = {}  # many changes share one variant
    for key, change in sorted(adapter.changes.items()):
        effective = said.get(id(change.variant))
        if effective is None:
            effective = said[id(change.variant)] = effect(change.variant)
        state.update(strict_json.canonical([key, effective]))
        for name, tensor in sorted(change.tensors.items()):
            state.update(strict_json.canonical([name, tensor_file.NAMES[tensor.dtype], list(tensor.shape)]))
            for piece in tensor_file.content(tensor):
                state.update(piece)
    return f"sha256:{state.hexdigest()}"


def effect(variant: Variant) -> dict[str, Any]:
    """What of a variant's options its changes depend on, as JSON values."""
    found = {k: v for k, v in variant.options().items() if k not in TRAINING_NOTES}
    scale = getattr(variant, "scale", None)
    if isinstance(scale, float):
        found = {k: v for k, v in found.items() if k not in ("alpha", "scaling")}
        found["scale"] = f"{scale:.10g}"
    return {"kind": variant.kind, **found}
