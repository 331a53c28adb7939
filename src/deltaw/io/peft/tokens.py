"""Trainable tokens: `<embedding>.token_adapter.trainable_tokens_delta` holds the new rows themselves, despite its name.

Which rows they are stands only in the config: `trainable_token_indices`, a list for the input embedding or
{module: list}. A head that is tied to the embedding follows it and is not saved again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaw.core.adapter import Adapter, Change, join_key, split_key
from deltaw.core.registry import variants
from deltaw.errors import AdapterError, DeltawError

SUFFIX = ".token_adapter.trainable_tokens_delta"
FIELD = "trainable_token_indices"
TOKENIZED = (None, "embedding", "linear", "linear (own forward)")
"""Layer families whose rows PEFT trains; None where a file does not tell."""


def read_tokens(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """(changes of rows, the tensors that are something else).

    Raises:
        AdapterError: rows without indices, or the other way round.
    """
    wanted = config.get(FIELD)
    rest = {k: t for k, t in tensors.items() if not k.endswith(SUFFIX)}
    mine = {k.removesuffix(SUFFIX): t for k, t in tensors.items() if k.endswith(SUFFIX)}
    if not wanted:
        if mine:
            raise AdapterError(f"the file holds trained rows of {next(iter(mine))!r}, the config no {FIELD}")
        return {}, rest
    if not mine:
        raise AdapterError(f"the config has {FIELD}, the file no trained rows")
    return {
        join_key(path, "weight"): rows_of(path, tensor, indices_of(wanted, path)) for path, tensor in mine.items()
    }, rest


def indices_of(wanted: Any, path: str) -> list[int]:
    """The row numbers that the config gives for the module at `path`."""
    if isinstance(wanted, dict):
        hits = [v for k, v in wanted.items() if path.endswith(k)]
        if len(hits) != 1:
            raise AdapterError(f"{FIELD} names {path!r} {len(hits)} times")
        wanted = hits[0]
    if not isinstance(wanted, list) or not all(type(i) is int for i in wanted):
        raise AdapterError(f"{FIELD} of {path!r} must be a list of row numbers, found {str(wanted)[:60]}")
    return wanted


def rows_of(path: str, tensor: Tensor, indices: list[int]) -> Change:
    """The change of some rows."""
    try:
        change = Change(variants["rows"](indices=tuple(indices)), {"value": tensor})
        _ = change.matrix_shape
    except DeltawError as error:
        raise AdapterError(f"{path!r}: {error}") from error
    return change


def cannot_tokens(adapter: Adapter) -> str | None:
    """Why PEFT cannot say the changed rows of `adapter`, or None."""
    for key, change in adapter.changes.items():
        path, site = split_key(key)
        if change.variant.kind == "rows" and (site != "weight" or not path or change.layer not in TOKENIZED):
            return f"chosen rows of {key!r}: it trains rows of embeddings and linear layers only"
    return None


def write_tokens(adapter: Adapter, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of changed rows, and in `config` their indices."""
    found = {}
    indices = {}
    for key, change in adapter.changes.items():
        if change.variant.kind == "rows":
            path = split_key(key)[0]
            indices[path] = list(change.variant.indices)  # type: ignore[attr-defined]
            found[path + SUFFIX] = change.tensors["value"]
    if indices:
        config[FIELD] = indices
    return found
