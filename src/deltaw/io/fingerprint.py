"""Fingerprint of a base model: is this the very model that the adapter was trained on?

Per parameter (and float buffer) it keeps the sha256 of the exact bytes, for fp32 also those of its fp16 and bf16 roundings,
and a sketch: 8 seeded random projections. So "the same weights in fp16, bf16 or fp32" is decided exactly; a quantised form
is compared by the sketch, whose distance estimates the relative difference of the weights. Parameters that the adapter
replaces as a whole (a new classifier) are left out, and so are those of adapters.

Cost: one sha256 pass over the weights, kept per model (io/known_weights.py says until when it counts). A comparison that
finds the same bytes needs no more than that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, join_key
from deltaw.io.base_walk import Inventory, Kept, inventory, kept_weights
from deltaw.io.known_weights import (
    Known,
    Look,
    complete_all,
    completed,
    derived,
    entry_now,
    looked_at,
    remember,
    sha,
    unchanged,
)
from deltaw.io.sketch import distance
from deltaw.io.tensor_file import NAMES
from deltaw.model.state import is_sharded, layers_of, unwrap

VERSION = 1
TOLERANCE = {"float": 0.01, "int8": 0.05, "other": 0.25}
"""Largest accepted sketch distance: between 16-bit roundings, to 8-bit and to other (4-bit) forms."""

OTHER = "!other values"


@dataclass(frozen=True)
class Comparison:
    """What comparing a base with a fingerprint found.

    verified: every recorded parameter was compared. other: parameters that differ, with the reason; precision: those
    that are the same weights in another precision.
    """

    verified: bool
    other: Mapping[str, str]
    precision: Mapping[str, str]


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """{"version", "parameters": {name: {"dtype", "shape", "sha256", ..., "sketch"}}} of the base of `model`.

    Adapters are left out and merged changes are looked through. `without`: names to leave out.

    Raises:
        ModelError: the model is on the meta device, or merged for good (its base is gone).
    """
    model = unwrap(model)
    if is_sharded(model):  # one weight at a time is whole, and nothing is remembered of it
        taken = (w for w in kept_weights(model) if w.name not in without)
        return {"version": VERSION, "parameters": {w.name: e for w in taken if (e := entry_now(w)) is not None}}
    found = looked_at(model, without)
    earlier = {name: known.original for name, (_, known) in found.items() if known.original is not None}
    return {"version": VERSION, "parameters": originals_of(complete_all(found), earlier)}


def originals_of(entries: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """`entries` with those of quantised weights replaced by what is known of the originals from before.

    earlier: entries of the same base, from a time when it was not quantised; only those count that still agree.
    """
    found = dict(entries)
    for name, entry in entries.items():
        before = (earlier or {}).get(name)
        if "form" not in entry or not isinstance(before, Mapping) or "form" in before:
            continue
        if before.get("shape") == entry["shape"] and distance(before.get("sketch"), entry["sketch"]) <= tolerance(
            entry
        ):
            found[name] = dict(before)
    return found


def tolerance(entry: Mapping[str, Any]) -> float:
    """How far a weight in this entry's form may be from its original."""
    form = entry.get("form", "dense")
    return TOLERANCE["float" if form == "dense" else "int8" if "8" in form else "other"]


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, form) of what the base keeps: parameters and persistent float buffers, each storage once.

    form is "dense", or how a quantised weight is kept; the tensor is then what it stands for.
    """
    for weight in kept_weights(model):
        tensor = weight.dense()
        if tensor is not None and tensor.is_floating_point():
            yield weight.name, tensor, weight.form


def entry_of(tensor: Tensor) -> dict[str, Any]:
    """The entry of a tensor that is no model's."""
    found = {"dtype": NAMES.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape), "sha256": sha(tensor)}
    return {**found, **derived(tensor)}


def compare(model: nn.Module | Inventory, recorded: Mapping[str, Any], without: Collection[str] = ()) -> Comparison:
    """Compare the base of a model, or of a walk over it, with a recorded fingerprint. `without`: names that need not agree."""
    there = recorded.get("parameters")
    if not isinstance(there, Mapping) or recorded.get("version") != VERSION or not (there or without):
        return Comparison(False, {}, {})
    base = model if isinstance(model, Inventory) else inventory(model)
    model, look = base.model, unchanged(base)
    if look is not None and agrees(look, there):
        return Comparison(True, {}, {})
    here = looked_at(model, without)
    if not without:
        remember(base, here)
    left = [n for n, e in there.items() if n not in without and not (n in here and same(e, here[n][1]))]
    more = [n for n in here if n not in there]
    if not left and not more:
        return Comparison(True, {}, {})
    aliases = _aliases(model)
    other: dict[str, str] = {}
    precision: dict[str, str] = {}
    for name in left:
        pair = here.get(name) or here.get(aliases.get(name, name))
        if pair is None:
            other[name] = "missing in this model"
            continue
        verdict = "" if same(there[name], pair[1]) else judge(there[name], completed(*pair))
        if verdict.startswith("!"):
            other[name] = verdict[1:]
        elif verdict:
            precision[name] = verdict
    # fp32 read from a 16-bit file, or the other way round
    common = {n: pair for n, pair in here.items() if n in there}
    if other and all(why == OTHER[1:] for why in other.values()) and set(other) <= set(common):
        short = rounding(there, common)
        if short is not None:
            return Comparison(True, {}, dict.fromkeys(other, f"{short} in F32"))
    for name in more:
        if aliases.get(name, name) not in there:
            other.setdefault(name, "not in the base that was trained on")
    return Comparison(True, other, precision)


def agrees(look: Look, recorded: Mapping[str, Any]) -> bool:
    """Whether a base that did not change has the very bytes that were recorded, to the last weight."""
    if recorded == look.agreed:  # one table for all adapters of a base (io/entry_lines.py): quick to tell
        return True
    if recorded.keys() != look.known.keys() or not all(same(e, look.known[n]) for n, e in recorded.items()):
        return False
    look.agreed = dict(recorded)
    return True


def same(recorded: Any, known: Known) -> bool:
    """Whether a weight has the very bytes that were recorded."""
    brief = known.brief
    return (
        brief is not None
        and type(recorded) is dict
        and recorded.get("sha256") == brief["sha256"]
        and recorded.get("dtype") == brief["dtype"]
        and recorded.get("shape") == brief["shape"]
    )


def judge(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """ "" if equal, "fp32 -> fp16" and the like if equal up to precision, "!reason" if other."""
    if not isinstance(recorded, Mapping):
        return "!its record is not readable"
    if recorded.get("shape") != found["shape"]:
        return f"!shape {found['shape']}, trained on {recorded.get('shape')}"
    was, now = recorded.get("dtype"), found["dtype"]
    was_form, form = recorded.get("form", "dense"), found.get("form", "dense")
    if was == now and recorded.get("sha256") == found["sha256"]:
        return ""
    if was_form == form == "dense":
        if was == now:
            return OTHER
        if recorded.get(f"sha256_{now}") == found["sha256"] is not None:
            return f"{was} -> {now}"
        if recorded.get("sha256") == found.get(f"sha256_{was}") is not None:
            return f"{was} -> {now}"
        if "F32" in (was, now) and {was, now} & {"F16", "BF16"}:
            return OTHER
    kinds = {was_form, form} - {"dense"}
    kind = "float" if not kinds else "int8" if all("8" in k for k in kinds) else "other"
    gap = distance(recorded.get("sketch"), found["sketch"])
    if gap <= TOLERANCE[kind]:
        return f"{was_form if was_form != 'dense' else was} -> {form if form != 'dense' else now}"
    return f"!other values (about {gap:.0%} apart)"


def rounding(there: Mapping[str, Any], here: Mapping[str, tuple[Kept, Known]]) -> str | None:
    """ "F16" or "BF16" if one base is the other, read from a file of that precision, as a whole; else None.

    A single value moved by less than a rounding does not count as such: over half of the matrices must differ.
    """
    entries = {n: completed(*pair) for n, pair in here.items()}
    matrices = [n for n, entry in entries.items() if len(entry["shape"]) > 1]
    moved = [n for n in matrices if there[n].get("sha256") != entries[n]["sha256"]]
    if not moved or 2 * len(moved) <= len(matrices):
        return None
    for short in ("F16", "BF16"):
        field = f"sha256_{short}"
        if any(there[n].get(field) is None or there[n].get(field) != e.get(field) for n, e in entries.items()):
            continue
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[short]
        weights = {n: _dense(weight) for n, (weight, _) in here.items()}
        if all(torch.equal(w.to(dtype).float(), w) for w in weights.values()):
            return short
        if all(there[n].get("sha256") == sha(w.to(dtype).float()) for n, w in weights.items()):
            return short
    return None


def _dense(weight: Kept) -> Tensor:
    dense = weight.dense()
    assert dense is not None
    return dense


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a shared parameter -> the name under which it is kept."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for path, module in layers_of(model).items():
        for site, parameter in module._parameters.items():
            if parameter is not None:
                name = join_key(path, site)
                found[name] = first.setdefault(id(parameter), name)
    return found


def replaced(adapter: Adapter) -> set[str]:
    """Parameters that the adapter replaces as a whole: the base's values there do not matter."""
    return {key for key, change in adapter.changes.items() if change.variant.kind == "full"}
