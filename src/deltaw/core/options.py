"""Checks that several variants make of their options, with messages that say how to mend them."""

from __future__ import annotations

import math
from typing import Any

from deltaw.errors import ConfigError, did_you_mean


def positive_int(name: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1 (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1, for example {name}=8")


def positive(name: str, value: Any, example: float = 16) -> None:
    """Refuse what is not a finite number above 0. example: one that would do, for the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r}: must be a finite number above 0, for example {name}={example}")


def probability(name: str, value: Any) -> None:
    """Refuse what is not in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{name}={value!r}: must be a probability in [0, 1), for example {name}=0.05")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse what is not among the known words."""
    if value not in known:
        raise ConfigError(
            f"{name}={value!r} is not one of {', '.join(map(repr, known))}{did_you_mean(str(value), known)}"
        )


def boolean(name: str, value: Any) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be True or False")
