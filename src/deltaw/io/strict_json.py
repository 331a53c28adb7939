"""JSON as admission wants it: bounded, no key twice, no NaN, nothing that Python's parser would quietly repair."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

from deltaw.errors import AdapterError

MAX_DEPTH = 32
"""Nesting beyond this is no adapter's business, and would only exhaust the parser's stack."""

TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
"""A JSON text, or one that never ends (so that no position is tried twice)."""
LONG = b"0" * 20
ZEROS = bytes(48 if 48 <= c < 58 else 32 for c in range(256))
"""A table in which every digit is a zero, everything else a space."""
NO_MARKS = bytes(c for c in range(256) if c not in b'[]{}"')
SQUARE = bytes.maketrans(b"{}", b"[]")


def parse(data: bytes, what: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        AdapterError: too large, not UTF-8, not JSON, not an object, a key twice, NaN or Infinity, nested too deep.
    """
    if len(data) > max_bytes:
        raise AdapterError(f"{what} holds {len(data):,} bytes; at most {max_bytes:,} are read")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{what} is not UTF-8 text: {error}") from error
    if _depth(data) > MAX_DEPTH:
        raise AdapterError(f"{what} is nested deeper than {MAX_DEPTH} levels")

    def no_constant(word: str) -> NoReturn:
        raise AdapterError(f"{what} holds {word}, which is not JSON")

    def finite(word: str) -> float:
        value = float(word)
        if value in (float("inf"), float("-inf")):
            raise AdapterError(f"{what} holds the number {word[:40]}, which is too large")
        return value

    def whole(word: str) -> int:
        if len(word) > 20:
            raise AdapterError(f"{what} holds the number {word[:40]}, which is too large")
        return int(word)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise AdapterError(f"{what} has the key {twice!r} twice")
        return found

    try:
        integers = whole if LONG in data.translate(ZEROS) else None
        value = json.loads(
            text, parse_constant=no_constant, parse_float=finite, parse_int=integers, object_pairs_hook=once
        )
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} must be a JSON object, found a {type(value).__name__}")
    return value


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pretty(value: Any) -> bytes:
    """JSON for people and files: sorted keys, two spaces, UTF-8, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _depth(data: bytes) -> int:
    """How deep `data` is nested, up to one more than allowed: how often the innermost brackets can be taken away."""
    marks = (TEXTS.sub(b"", data) if b"\\" in data else data).translate(SQUARE, NO_MARKS)
    brackets = b"".join(
        marks.replace(b'""', b"").split(b'"')[::2]
    )  # of pairs taken away, what is in a text stays in one
    depth = 0
    while depth <= MAX_DEPTH and b"[]" in brackets:
        brackets = brackets.replace(b"[]", b"")
        depth += 1
    return depth + brackets.count(b"[")
