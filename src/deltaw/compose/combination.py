"""`combine`: several adapters of one base -> one adapter, with the error that this costs, weight by weight.

A weight that an adapter does not touch counts as a change of zero. Changes that depend on the base weight (DoRA, trained
copies) enter by what they truly do to it, which needs the base; a sum of copies whose weights add up to 1 does not:
W + Σ wᵢ (Wᵢ - W) = Σ wᵢ Wᵢ. One weight is worked on at a time, so memory is that of the largest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from deltaw.compose.agreement import agreed_base, agreed_extra, agreed_labels
from deltaw.compose.combiner import Combiner, combiners
from deltaw.compose.one_weight import OneWeight, Part
from deltaw.compose.weights import Weights, weights_by_parameter
from deltaw.core import options as check
from deltaw.core.adapter import Adapter, Change, check_adapter
from deltaw.core.base_weights import Base
from deltaw.errors import ConfigError, NonFinite, did_you_mean
from deltaw.io.admission import finite


def combine(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    *,
    how: str | Combiner = "cat",
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    base: Base | None = None,
    allow_base_mismatch: bool = False,
    **options: Any,
) -> Adapter:
    """Blend `adapters`, all trained on one base, into one.

    adapters: adapters as values (`dw.read`, `dw.get`). A weight that one of them does not touch counts as zero there.
    weights: one number per adapter, any sign; `(1, -1)` is task arithmetic. Or a mapping of patterns to such lists for
        block-wise weights (`{"layers.0": [1, 0], "*": [.5, .5]}`). None: 1 each.
    how: "cat" (exact sum, ranks add up), "svd" (exact sum, truncated), "linear", "ties", "dare", "magnitude", "slerp",
        or a `Combiner` with its options.
    rank, energy: truncate the result of any `how` by SVD to this rank, or to this share of Σσ². What all adapters that
        touch it keep whole (norms, biases, heads) stays whole.
    seed: of what is drawn at random (DARE's masks).
    base: the base model, or its parameters by name; needed for changes that depend on the base weight.
    options: the combiner's own, as in `density=0.2`.

    Returns an Adapter of LoRA changes (and trained copies). Its `.error` has, per parameter, the relative Frobenius
    distance to the exact sum Σ wᵢ ΔWᵢ, rounding included; `extra["combined"]` has the call and, per parameter, the
    distance to what `how` defines ("truncation"), and the trained copies that were averaged because the base does not
    have them or was not given ("averaged"), and the parameters that are kept whole, at no rank ("whole").

    Raises:
        ConfigError: options that contradict each other, a change that depends on a base that was not given, or
            classifiers of different labels.
        NonFinite: the blend is larger than its tensors' dtype can say.
        AdapterError: adapters of different shapes, or with values that are not finite.
        BaseMismatch: adapters of different bases.
    """
    if not isinstance(adapters, Iterable):
        raise ConfigError(
            f"combine takes a list of adapters, as in dw.combine([a, b]); found {type(adapters).__name__}"
        )
    adapters = list(adapters)
    blender = _combiner(how, options)
    if rank is not None:
        check.positive_int("rank", rank)
    check.seed(seed)
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise ConfigError(f"energy={energy!r}: the share of the squared singular values to keep, in (0, 1]")
    if not adapters:
        raise ConfigError("combine needs at least one adapter")
    for adapter in adapters:
        check_adapter(adapter, "combine")
    known = agreed_base(adapters, allow_base_mismatch)

    keys = list(dict.fromkeys(key for adapter in adapters for key in adapter.changes))
    table = weights_by_parameter(weights, keys, len(adapters))
    labels = agreed_labels(adapters, table)
    one = OneWeight(how=blender, rank=rank, energy=energy, seed=seed, base=base)
    changes: dict[str, Change] = {}
    error: dict[str, float] = {}
    truncation: dict[str, float] = {}
    averaged: list[str] = []
    for key in keys:
        parts = [
            Part(w, a.changes[key], i) for i, (w, a) in enumerate(zip(table[key], adapters)) if key in a.changes and w
        ]
        if not parts:
            continue
        blended = one.blend(key, parts)
        if not all(finite(t) for t in blended.change.tensors.values()):
            raise NonFinite(f"{key}: the blend is too large for its numbers' format: give smaller weights")
        changes[key], error[key], truncation[key] = blended.change, blended.error, blended.truncation
        averaged += [key] * blended.averaged
    if not changes:
        raise ConfigError("nothing is left: every weight is zero")
    record = {
        "how": repr(blender),
        "weights": {p: list(v) for p, v in weights.items()} if isinstance(weights, Mapping) else list(table[keys[0]]),
        "rank": rank,
        "energy": energy,
        "seed": seed,
        "truncation": truncation,
        "averaged": averaged,
        "whole": [key for key, change in changes.items() if change.variant.any_shape],
    }
    return Adapter(
        changes=changes, base=known, extra={**agreed_extra(adapters), **labels, "combined": record}, error=error
    )


def _combiner(how: str | Combiner, options: dict[str, Any]) -> Combiner:
    if isinstance(how, Combiner):
        if options:
            raise ConfigError(f"{', '.join(options)}: give the options to {type(how).__name__}(...) itself")
        return how
    if not isinstance(how, str):
        raise ConfigError(f"how={how!r}: give one of {', '.join(name for name, _ in combiners.items())}, or a Combiner")
    cls = combiners[how]
    known = [f.name for f in fields(cls)]
    for name in options:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise ConfigError(f"how={how!r} has no option {name!r}{did_you_mean(name, known)} ({takes})")
    made: Combiner = cls(**options)
    return made
