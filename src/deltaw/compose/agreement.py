"""What several adapters say of their base, their labels and their task, reduced to what they all agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.errors import BaseMismatch


def agreed(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that are the same in all mappings that have them at all."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: [fact[key] for fact in facts if key in fact] for key in keys}
    return {key: found[0] for key, found in values.items() if all(v == found[0] for v in found)}


def agreed_base(adapters: Sequence[Adapter], allow_mismatch: bool = False) -> dict[str, Any]:
    """What is known of the common base.

    Raises:
        BaseMismatch: two adapters carry different fingerprints or were made for differently named bases.
    """
    known = [adapter.base for adapter in adapters if adapter.base]
    common = agreed(known)
    differing = sorted({key for fact in known for key in fact} - set(common))
    if differing and not allow_mismatch:
        key = differing[0]
        said = [str(fact[key]) for fact in known if key in fact]
        raise BaseMismatch(
            f"the adapters were made for different bases: {key} is {' and '.join(dict.fromkeys(s[:80] for s in said))}. "
            f"Their changes cannot be added up; if you know that the bases are the same, pass allow_base_mismatch=True"
        )
    return common


def agreed_extra(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Facts that travel with the result: those that all adapters have, and alike (a label map; not their metrics)."""
    common = agreed([adapter.extra for adapter in adapters])
    return {k: v for k, v in common.items() if all(k in a.extra for a in adapters) and k != "combined"}
