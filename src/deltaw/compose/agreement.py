"""What several adapters say of their base, their labels and their task, reduced to what they all agree on.

Changes of different bases cannot be added up. Where the adapters carry fingerprints (io/fingerprint.py) these decide,
parameter by parameter, and the names of the bases do not matter (one and the same model is a hub id for one adapter and
a local folder for the other); without fingerprints the names do, up to the folder that they lie in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.errors import BaseMismatch, ConfigError
from deltaw.io.fingerprint import TOLERANCE
from deltaw.io.sketch import distance

LABELS = ("labels", "id2label")
"""The facts of an adapter that name its classes: a list, or PEFT's table of numbers."""


def agreed(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that are the same in all mappings that have them at all."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: [fact[key] for fact in facts if key in fact] for key in keys}
    return {key: found[0] for key, found in values.items() if all(v == found[0] for v in found)}


def agreed_base(adapters: Sequence[Adapter], allow_mismatch: bool = False) -> dict[str, Any]:
    """What is known of the common base.

    Raises:
        BaseMismatch: two adapters carry fingerprints of different weights or, without these, name different bases.
    """
    known = [adapter.base for adapter in adapters]
    common = agreed(known)
    prints = [fact["fingerprint"] for fact in known if isinstance(fact.get("fingerprint"), Mapping)]
    if prints:
        common["fingerprint"] = prints[0]
    reasons = []
    for other in prints[1:]:
        reasons += differences(common["fingerprint"], other)
        parameters = {**other.get("parameters", {}), **common["fingerprint"].get("parameters", {})}
        common["fingerprint"] = {**common["fingerprint"], "parameters": parameters}
    if len(prints) < len(adapters):
        named = dict.fromkeys(str(fact["name"]).rstrip("/").rpartition("/")[2] for fact in known if "name" in fact)
        reasons += [f"they name {' and '.join(map(repr, named))}"] if len(named) > 1 else []
    if reasons and not allow_mismatch:
        raise BaseMismatch(
            f"the adapters were made for different bases: {reasons[0]}. Their changes cannot be added up; "
            f"if you know that the bases are the same, pass allow_base_mismatch=True (--allow-base-mismatch)"
        )
    if reasons:
        common.pop("fingerprint", None)
    return common


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parameters whose fingerprints are those of different weights, whatever the precision and form."""
    mine, theirs = one.get("parameters", {}), other.get("parameters", {})
    if mine and theirs and mine.keys().isdisjoint(theirs):
        return [f"they have no parameter in common ({next(iter(mine))!r} and {next(iter(theirs))!r}, for example)"]
    return [f"{name} has other values" for name in mine if name in theirs and not _same(mine[name], theirs[name])]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    hashes = [{v for k, v in entry.items() if k.startswith("sha256")} for entry in (one, other)]
    if one.get("shape") != other.get("shape"):
        return False
    if hashes[0] & hashes[1]:
        return True
    forms = {one.get("form", "dense"), other.get("form", "dense")}
    if forms == {"dense"}:
        return False
    return distance(one.get("sketch"), other.get("sketch")) <= TOLERANCE["other"]


def agreed_extra(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Facts that travel with the result: those that all adapters have, and alike (a label map; not their metrics)."""
    common = agreed([adapter.extra for adapter in adapters])
    return {k: v for k, v in common.items() if all(k in a.extra for a in adapters) and k != "combined"}


def class_names(facts: Mapping[str, Any]) -> list[str]:
    """The class names in the order of the classes; empty where there are none."""
    table = dict(facts.get("id2label") or {})
    ordered = [table[key] for key in sorted(table, key=lambda key: (len(str(key)), str(key)))]
    return [str(name) for name in facts.get("labels") or ordered]


def said_labels(facts: Mapping[str, Any]) -> list[str] | None:
    """`class_names`; None where there are none, or only the placeholders of transformers."""
    names = class_names(facts)
    return None if not names or all(name == f"LABEL_{n}" for n, name in enumerate(names)) else names


def unlabelled(adapter: Adapter) -> Adapter:
    """The adapter without its class names."""
    return adapter.replace(extra={k: v for k, v in adapter.extra.items() if k not in LABELS})


def agreed_labels(adapters: Sequence[Adapter], weights: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The label facts of the classifier that the result has, from the adapters that take part in it; empty if none says any.

    A classifier is a weight with as many rows as its adapter has class names.

    Raises:
        ConfigError: classifiers of different labels are blended: class 0 of one is not class 0 of the other.
    """
    named = {i: names for i, adapter in enumerate(adapters) if (names := said_labels(adapter.extra))}
    facts: dict[str, Any] = {}
    for key, shares in weights.items():
        parts = [i for i, w in enumerate(shares) if w and key in adapters[i].changes]
        heads = [i for i in parts if i in named]
        if not any(adapters[i].changes[key].matrix_shape[:1] == (len(named[i]),) for i in heads):
            continue
        for i in heads[1:]:
            if named[i] != named[heads[0]]:
                raise ConfigError(
                    f"{key} is a classifier of {named[heads[0]]} in adapter {heads[0] + 1} and of {named[i]} in adapter "
                    f"{i + 1}: combine adapters of the same labels in the same order, or give {key.rpartition('.')[0]!r} "
                    "the weight of one adapter only"
                )
        if heads == parts:
            facts = {k: v for i in heads for k, v in adapters[i].extra.items() if k in LABELS}
    return facts
