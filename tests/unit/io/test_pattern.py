"""Patterns of files mean what `re` means, however they are run, and end in time."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from deltaw.errors import AdapterError
from deltaw.io.pattern import MAX_STEPS, Pattern, pattern

PATHS = [
    "",
    "a",
    "ab",
    "ba.ab",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "aaaa",
    "a.a.b",
    "b\n",
]
SIMPLE = [
    r".*\.layers\.\d+\..*(q_proj|down_proj)",
    r"^(?!.*mlp).*q_proj$",
    r"[ab]+",
    r"(a|b)*",
    r"(?:a|aa)+b?",
    r"(?:.*?(?:self|mlp).*?(?:q|k|down)_proj.*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    r"a{2,3}",
    r"[^b.]*\W?\w*",
    r"\bab\b|\Ba",
    r"(?:a?){3}a{3}",
    r"(?=a)(a|b|\.)*",
    r"",
    r"b$",
]


@pytest.mark.parametrize("text", SIMPLE)
def test_sets_of_positions_agree_with_re(text: str) -> None:
    here = Pattern(text)
    for simple, path in itertools.product((True, False), PATHS):
        here.simple = simple
        assert here.fullmatch(path) == (re.fullmatch(text, path) is not None), (simple, path)
        if "\n" not in path and "^" not in text and "(?=" not in text and "\\b" not in text:
            assert here.matches_end(path) == (re.match(rf"(.*\.)?({text})$", path) is not None), (simple, path)


def test_random_patterns_agree_with_re() -> None:
    rng = random.Random(0)

    def made(depth: int) -> str:
        match rng.randrange(6 if depth else 2):
            case 0 | 1:
                return rng.choice(["a", "b", ".", "[ab]", r"\.", "[^a]"])
            case 2 | 3:
                return made(depth - 1) + made(depth - 1)
            case 4:
                return f"(?:{made(depth - 1)}|{made(depth - 1)})"
            case _:
                return f"(?:{made(depth - 1)}){rng.choice(['*', '+', '?', '{1,2}', '*?', '{2}'])}"

    for _ in range(400):
        text, path = made(4), "".join(rng.choices("ab.", k=rng.randrange(8)))
        here = Pattern(text)
        here.simple = False
        assert here.fullmatch(path) == (re.fullmatch(text, path) is not None), (text, path)
        assert here.matches_end(path) == (re.match(rf"(.*\.)?({text})$", path) is not None), (text, path)


@pytest.mark.parametrize(
    "text",
    [
        "(.*)*x",
        "(a+)+b",
        "(.|.|.)*z",
        "(a|a)*b",
        "(a?)" * 25 + "a" * 25,
        ".*" * 30 + "x",
        ".{0,9999}" * 50 + "z",
        "(?:.{0,1000}){0,1000}z",
    ],
)
def test_patterns_that_would_take_forever_end(text: str) -> None:
    here, path = Pattern(text), "a" * 60 + ".q_proj"
    assert not here.simple
    assert not here.fullmatch(path)
    assert here.steps < MAX_STEPS


def test_a_pattern_beyond_the_budget_is_refused() -> None:
    here = Pattern("(?:" + "|".join(f".*{c}.*" for c in "xyz" * 400) + ")*!")
    with pytest.raises(AdapterError, match="takes too long"):
        here.fullmatch("xyz" * 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r"(a)\1", "groupref"),
        (r"(?<=a)b", "lookbehind"),
        (r"(?>a+)b", "atomic group|no valid"),
        (r"(a)?(?(1)b|c)", "groupref exists"),
        ("a(?i:b)", "flags midway"),
        ("(?i)(ab|b)*", "too many repeats"),
        ("(", "no valid"),
        ("a" * 30_000, "at most"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        pattern(text)
