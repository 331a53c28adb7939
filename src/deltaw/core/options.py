"""Options as values: given by name, compared, printed as the call that makes them; and checks that several make of theirs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

from deltaw.errors import ConfigError, did_you_mean


class Options:
    """What variants and forms of the frozen weight have in common, as frozen dataclasses (`kw_only=True, repr=False`).

    Raises:
        ConfigError: an option that there is not, or one without its name.
    """

    def __new__(cls, *given: Any, **options: Any) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if given and not known:
            raise ConfigError(f"{cls.__name__} has no options: leave out {given[0]!r}")
        if given:
            name = "rank" if "rank" in known else known[-1]
            raise ConfigError(f"{cls.__name__} takes its options by name, as in {cls.__name__}({name}={given[0]!r})")
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no option {name!r}{did_you_mean(name, known)} "
                    f"({'known: ' + ', '.join(known) if known else 'it has none'})"
                )
        return super().__new__(cls)

    def options(self) -> dict[str, Any]:
        """Field name -> value, those that differ from the default only."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"


def positive_int(name: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1 (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1, for example {name}=8")


def seed(value: Any) -> None:
    """Refuse what is not a whole number of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"seed={value!r}: must be a whole number from -2**63 to 2**63 - 1, for example seed=0")


LARGEST = (2 - 2.0**-23) * 2.0**127
"""The largest finite number in float32, in which torch multiplies by what is no tensor."""


def positive(name: str, value: Any, example: float = 16) -> None:
    """Refuse what is not a number above 0 and finite in float32. example: one that would do, for the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
        raise ConfigError(
            f"{name}={value!r}: must be a finite number above 0 (in float32), for example {name}={example}"
        )


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
