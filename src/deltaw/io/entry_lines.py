"""The fingerprint of a base as a manifest keeps it: one line for each weight,

    dtype shape form sha256 sha256_F16 sha256_BF16 sketch name         F32 1024x8 dense 3fa9.. 77b1.. 90cc.. 3.2e-01,.. encoder.weight

("-" for what an entry lacks). Adapters of one base have the same lines: they are taken apart once, and all adapters that
are loaded share the result, where a thousand tables of their own would weigh as much as the adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.errors import AdapterError

Entries = Mapping[str, Mapping[str, Any]]

HASHES = ("sha256", "sha256_F16", "sha256_BF16")


def to_lines(entries: Entries) -> list[str] | None:
    """The lines of a fingerprint's entries; None if they are not such as this version makes."""
    lines = []
    for name, entry in entries.items():
        try:
            shape = "x".join(map(str, entry["shape"])) or "()"
            fields = [entry["dtype"], shape, entry.get("form", "dense"), *(entry.get(h, "-") for h in HASHES)]
            line = " ".join([*fields, ",".join(entry["sketch"]), name])
            if entry_of(line) != (name, entry):
                return None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        lines.append(line)
    return lines


def from_lines(lines: Sequence[Any]) -> Entries:
    """The entries again; those of equal lines are one object, not to be written to.

    Raises:
        AdapterError: a line is not readable, or two are of one weight.
    """
    try:
        return _shared(tuple(lines))
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"the manifest's fingerprint of the base is not readable: {error}") from error


@functools.lru_cache(maxsize=8)
def _shared(lines: tuple[str, ...]) -> Entries:
    found = dict(map(entry_of, lines))
    if len(found) < len(lines):
        raise ValueError("a weight is described twice")
    return found


def entry_of(line: str) -> tuple[str, dict[str, Any]]:
    """(name, entry) of one line."""
    dtype, shape, form, *hashes, sketch, name = line.split(" ", 7)
    entry: dict[str, Any] = {"dtype": dtype, "shape": [] if shape == "()" else [int(n) for n in shape.split("x")]}
    if form != "dense":
        entry["form"] = form
    entry |= {key: value for key, value in zip(HASHES, hashes, strict=True) if value != "-"}
    entry["sketch"] = sketch.split(",")
    return name, entry
