"""Every error that deltaw raises on purpose.

    DeltawError                       the root: `except dw.errors.DeltawError` catches all of ours
    ├── ConfigError (ValueError)      what you asked for cannot be; exit code 2
    │   ├── TargetError               a target matches nothing, or a layer that no host adapts
    │   ├── NameTaken                 an adapter of that name is there already
    │   └── UnknownName (LookupError) no adapter, recipe, key ... of that name
    ├── DataError (ValueError)        the data cannot be used; exit code 3
    ├── AdapterError (ValueError)     an adapter file or value is damaged, foreign or does not fit; exit code 2
    │   └── BaseMismatch              made for other base weights
    ├── ModelError (RuntimeError)     the model is in a state in which that cannot be done; exit code 2
    ├── NonFinite (ArithmeticError)   a loss, gradient or weight is not finite; exit code 4
    ├── OutOfMemory (MemoryError)     even the smallest micro-batch does not fit; exit code 5
    └── MissingExtra (ImportError)    an optional package is not installed; exit code 2

A message says what was asked, what was found and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltawError(Exception):
    """Root of deltaw's errors. `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigError(DeltawError, ValueError):
    """What was asked for contradicts itself or the model."""


class TargetError(ConfigError):
    """A target matches no layer, or a layer that cannot be adapted."""


class NameTaken(ConfigError):
    """An adapter of this name is there already."""


class UnknownName(ConfigError, LookupError):
    """Nothing of this name is known."""


class DataError(DeltawError, ValueError):
    """The data set is missing, empty or unusable."""

    exit_code = 3


class AdapterError(DeltawError, ValueError):
    """An adapter is damaged, foreign, incomplete or of the wrong shape."""


class BaseMismatch(AdapterError):
    """The adapter was trained on other base weights."""


class ModelError(DeltawError, RuntimeError):
    """The model is in a state in which this cannot be done."""


class NonFinite(DeltawError, ArithmeticError):
    """A value that must be finite is NaN or infinite."""

    exit_code = 4


class OutOfMemory(DeltawError, MemoryError):
    """The work does not fit into memory."""

    exit_code = 5


class MissingExtra(DeltawError, ImportError):
    """An optional dependency is missing; the message holds the install command."""


def did_you_mean(name: str, known: Iterable[str], how_many: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=how_many, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
