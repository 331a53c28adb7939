"""How much of each adapter: one number each for the whole model, or different ones for different blocks of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from deltaw.core.options import LARGEST
from deltaw.errors import ConfigError, did_you_mean

Weights = Sequence[float] | Mapping[str, Sequence[float]] | None
"""One number per adapter; or pattern -> one number per adapter; None means 1 for each (the plain sum)."""

OTHERS = "*"
"""The pattern for every parameter that no other pattern names."""


def matches(pattern: str, key: str) -> bool:
    """Whether `pattern` names the parameter `key`: as whole dotted parts of it ("layers.1"), or as a regular expression.

    "layers.1" is in "model.layers.1.q.weight", not in "model.layers.10.q.weight". A regular expression must match the
    whole name.
    """
    if f".{pattern}." in f".{key}.":
        return True
    try:
        return re.fullmatch(pattern, key) is not None
    except re.error:
        return False


def weights_by_parameter(weights: Weights, keys: Iterable[str], count: int) -> dict[str, tuple[float, ...]]:
    """Parameter name -> one weight per adapter, for `count` adapters.

    Raises:
        ConfigError: a wrong number of weights, one that is not finite; a pattern that matches no parameter; a parameter
            that no pattern matches, or that two match with different weights.
    """
    keys = list(keys)
    if weights is None:
        return dict.fromkeys(keys, (1.0,) * count)
    if not isinstance(weights, Mapping):
        return dict.fromkeys(keys, _checked(weights, count, "weights"))
    for pattern in weights:
        if not isinstance(pattern, str):
            raise ConfigError(
                f"weights: {pattern!r} is no pattern: give parts of parameter names, for example 'layers.0'"
            )
    table = {pattern: _checked(values, count, f"weights[{pattern!r}]") for pattern, values in weights.items()}
    named = {p: [k for k in keys if matches(p, k)] for p in table if p != OTHERS}
    for pattern, found in named.items():
        if not found:
            parts = {part for k in keys for part in (k, k.rpartition(".")[0])}
            raise ConfigError(
                f"weights: {pattern!r} matches none of the {len(keys)} parameters that the adapters change"
                f"{did_you_mean(pattern, parts)}"
            )
    result: dict[str, tuple[float, ...]] = {}
    for key in keys:
        found = [p for p in named if key in named[p]]
        values = {table[p] for p in found}
        if len(values) > 1:
            raise ConfigError(
                f"weights: {' and '.join(map(repr, found))} both match {key} and differ; make them disjoint"
            )
        if not values and OTHERS not in table:
            raise ConfigError(f"weights: no pattern matches {key}; add {OTHERS!r} for all others")
        result[key] = values.pop() if values else table[OTHERS]
    return result


def _checked(values: Sequence[float], count: int, name: str) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ConfigError(f"{name}={values!r}: give one number per adapter, for example [0.6, -0.4]")
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name}={values!r}: give one number per adapter, for example [0.6, -0.4]") from error
    if len(numbers) != count:
        raise ConfigError(f"{name}: {len(numbers)} weights for {count} adapters; give one per adapter, in their order")
    if not all(abs(v) <= LARGEST for v in numbers):
        raise ConfigError(f"{name}={list(numbers)}: every weight must be a finite number (in float32)")
    return numbers
