"""Regular expressions out of files of others: they mean what Python's `re` means, and can take neither long nor forever.

Python's matcher backtracks, so that a pattern of twenty characters can take years. Patterns with few repeats, none around a
choice or another repeat, run as they are. All others run here, on sets of positions: every part of the pattern is applied
to all places at once where a match could be by then, which visits no pair of part and place twice; the steps are counted,
and a pattern that takes too many is refused. Backreferences and lookbehind are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from deltaw.errors import AdapterError

try:
    from re import _parser as _regex  # type: ignore[attr-defined]
except ImportError:  # pragma: no cover
    import sre_parse as _regex

MAX_LENGTH = 20_000
MAX_STEPS = 100_000
"""Pairs of a part and a place that one path may cost: some tenths of a second at the very most."""
FEW = 2
"""Repeats in one pattern that backtracking may have to combine."""
REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
}


@functools.lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """The pattern that `text` means.

    Raises:
        AdapterError: it is no regular expression, too long, or uses what cannot be bounded.
    """
    return Pattern(text)


class Pattern:
    """A checked pattern. `simple`: it runs as `re` does."""

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            raise AdapterError(f"a pattern of {len(text):,} characters in the config; at most {MAX_LENGTH:,} are read")
        try:
            self.tree = _regex.parse(text)
            self.whole = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"the pattern {text[:80]!r} in the config is no valid regular expression: {error}"
            ) from error
        check(self.tree, text)
        self.simple = repeats(self.tree) <= FEW and not choices_repeated(self.tree, False)
        self.steps = 0
        if not self.simple and self.whole.flags & ~re.UNICODE:
            raise AdapterError(f"the pattern {text[:80]!r} in the config has flags, and too many repeats for them")

    def fullmatch(self, path: str) -> bool:
        """As `re.fullmatch(text, path)`."""
        if self.simple:
            return self.whole.fullmatch(path) is not None
        self.steps = 0
        return len(path) in self.after(self.tree, path, {0})

    def matches_end(self, path: str) -> bool:
        """As `re.match(rf"(.*\\.)?({text})$", path)`: the pattern is the whole path, or what follows a dot of it."""
        starts = [0, *(i + 1 for i, c in enumerate(path) if c == ".")]
        if self.simple:
            return any(self.whole.fullmatch(path, start) is not None for start in starts)
        self.steps = 0
        return len(path) in self.after(self.tree, path, set(starts))

    # ---- sets of positions

    def after(self, tree: Iterable[Any], path: str, places: set[int]) -> set[int]:
        """Where a match of `tree` can end that starts at one of `places`."""
        for operation, argument in tree:
            self.steps += len(places) + 1
            if self.steps > MAX_STEPS:
                raise AdapterError(f"the pattern {self.text[:80]!r} in the config takes too long to match: refused")
            if not places:
                return places
            places = self.step(str(operation), argument, path, places)
        return places

    def step(self, name: str, argument: Any, path: str, places: set[int]) -> set[int]:
        """The same for one part of the pattern."""
        if name == "BRANCH":
            return set().union(*(self.after(part, path, places) for part in argument[1]))
        if name == "SUBPATTERN":
            return self.after(argument[3], path, places)
        if name in REPEATS:
            return self.repeated(argument, path, places)
        if name == "AT":
            return {p for p in places if stands(str(argument), path, p)}
        if name in ("ASSERT", "ASSERT_NOT"):
            wanted = name == "ASSERT"
            return {p for p in places if bool(self.after(argument[1], path, {p})) == wanted}
        return {p + 1 for p in places if p < len(path) and takes(name, argument, path[p])}

    def repeated(self, argument: Any, path: str, places: set[int]) -> set[int]:
        """`least` times for certain, then as often as new places are reached, `most` times at most."""
        least, most, body = argument
        for _ in range(least):
            before, places = places, self.after(body, path, places)
            if not places or places == before:
                break
        found, new, times = set(places), places, least
        while new and times < most:
            new = self.after(body, path, new) - found
            found |= new
            times += 1
        return found


def takes(name: str, argument: Any, c: str) -> bool:
    """Whether a part of one character takes `c`."""
    if name == "LITERAL":
        return bool(ord(c) == argument)
    if name == "NOT_LITERAL":
        return bool(ord(c) != argument)
    if name == "ANY":
        return c != "\n"
    found, negated = False, False
    for kind, value in argument:  # IN
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                found = found or ord(c) == value
            case "RANGE":
                found = found or value[0] <= ord(c) <= value[1]
            case "CATEGORY":
                found = found or CATEGORIES[str(value)](c)
    return found != negated


def stands(where: str, path: str, p: int) -> bool:
    """Whether place `p` is a beginning, an end, or a boundary of words."""
    if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return p == 0
    if where == "AT_END":
        return p == len(path) or path[p:] == "\n"
    if where == "AT_END_STRING":
        return p == len(path)
    word = CATEGORIES["CATEGORY_WORD"]
    edge = (p > 0 and word(path[p - 1])) != (p < len(path) and word(path[p]))
    return edge == (where == "AT_BOUNDARY")


def check(tree: Any, text: str) -> None:
    """Refuse what neither way of matching can bound."""
    for operation, argument in tree:
        name = str(operation)
        behind = name in ("ASSERT", "ASSERT_NOT") and argument[0] < 0
        if behind or name in ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP", "POSSESSIVE_REPEAT"):
            kind = "lookbehind" if behind else name.lower().replace("_", " ")
            raise AdapterError(f"the pattern {text[:80]!r} in the config uses {kind}: refused")
        if name == "SUBPATTERN" and (argument[1] or argument[2]):
            raise AdapterError(f"the pattern {text[:80]!r} in the config changes flags midway: refused")
        for part in parts(argument):
            check(part, text)


def repeats(tree: Any) -> int:
    """How many variable repeats one way through the pattern meets, at most."""
    total = 0
    for operation, argument in tree:
        inner = [repeats(part) for part in parts(argument)]
        variable = str(operation) in REPEATS and argument[0] != argument[1]
        total += variable + (max(inner, default=0) if str(operation) == "BRANCH" else sum(inner))
    return total


def choices_repeated(tree: Any, inside: bool) -> bool:
    """Whether a repeat holds a choice, or another repeat."""
    for operation, argument in tree:
        name = str(operation)
        if inside and (name == "BRANCH" or name in REPEATS):
            return True
        if any(choices_repeated(part, inside or name in REPEATS) for part in parts(argument)):
            return True
    return False


def parts(argument: Any) -> Iterable[Any]:
    """The patterns inside a part's argument."""
    if isinstance(argument, _regex.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from parts(part)
