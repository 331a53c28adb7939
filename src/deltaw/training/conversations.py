"""Rows of any usual kind as conversations: [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...].

messages      {"messages": [{"role", "content"}, ...]}                  OpenAI, TRL
sharegpt      {"conversations": [{"from": "human", "value": ...}, ...]}
completion    {"prompt": ..., "completion": ...}                        texts, or lists of messages
alpaca        {"instruction": ..., "input": ..., "output": ...}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

from deltaw.errors import DataError
from deltaw.training.config import DataConfig
from deltaw.training.order import generator
from deltaw.training.rows import SPLITS, part_of, read_source, to_score

Message = dict[str, str]
Conversation = list[Message]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
}
"""Role in a file -> role in a chat template."""
KINDS = "messages, prompt + completion, instruction + output (alpaca), or conversations (sharegpt)"
CORPUS = "chatterbot-corpus"
TALKS = ("conversations", "health", "psychology", "sports")
"""Topics of the corpus whose lists are dialogues; in the others, what follows the answer is another answer."""
LONGEST = 30
"""Lines of the corpus's longest dialogue; a longer list is a mistake in it."""


class Unusable(ValueError):
    """A row that cannot be learnt from; the text says why, as the end of "dropped: 3 ..."."""


def as_messages(row: Mapping[str, Any]) -> Conversation:
    """One row as messages that end with an answer.

    Raises:
        Unusable: it is of no known kind, lacks an answer, or holds an empty or misplaced message.
    """
    if _is_list(row.get("messages")):
        found = [_message(m, "role", "content") for m in row["messages"]]
    elif _is_list(row.get("conversations")):
        turns = row["conversations"]
        keys = ("from", "value") if any("from" in t for t in turns if isinstance(t, Mapping)) else ("role", "content")
        found = [_message(m, *keys) for m in turns]
    elif "prompt" in row and "completion" in row:
        found = [*_side(row["prompt"], "user"), *_side(row["completion"], "assistant")]
    elif "instruction" in row and "output" in row:
        more = _text(row.get("input"))
        asked = _text(row["instruction"])
        found = [
            _message({"role": "user", "content": f"{asked}\n\n{more}" if more else asked}, "role", "content"),
            _message({"role": "assistant", "content": row["output"]}, "role", "content"),
        ]
    else:
        raise Unusable("of no known kind")
    while found and found[-1]["role"] != "assistant":
        found.pop()
    if not found:
        raise Unusable("without an answer")
    first = next(m["role"] for m in found if m["role"] != "system")
    if first != "user":
        raise Unusable("without a question")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _side(value: Any, role: str) -> Conversation:
    if _is_list(value):
        return [_message(m, "role", "content") for m in value]
    return [_message({"role": role, "content": value}, "role", "content")]


def _message(found: Any, role: str, content: str) -> Message:
    if not isinstance(found, Mapping) or role not in found or content not in found:
        raise Unusable(f"with a message that lacks {role!r} or {content!r}")
    name = ROLES.get(str(found[role]).lower())
    if name is None:
        raise Unusable(f"with an unknown role {str(found[role])[:20]!r}")
    text = _text(found[content])
    if not text:
        raise Unusable("with an empty message")
    return {"role": name, "content": text}


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


@dataclass(frozen=True)
class Conversations:
    """Split -> conversations, where they are from, and what was dropped and why."""

    splits: dict[str, list[Conversation]]
    where: str
    dropped: dict[str, int] = field(default_factory=dict)


def conversations(data: DataConfig, seed: int) -> Conversations:
    """Read, clean and split `data`. Missing splits are cut from the training rows with `seed`.

    A conversation that comes twice counts once. Those that open with the same question stay in one split, so that no
    held-out question was trained on.

    Raises:
        DataError: nothing usable is left; the message holds the reasons.
    """
    source, where = _source(data)
    if data.split is not None:
        source = {"train": part_of(source, where, data.split)}
    dropped: Counter[str] = Counter()
    claimed: set[str] = set()
    clean = {name: _clean(source[name], claimed, dropped) for name in SPLITS if name in source}
    groups = list(clean.pop("train", {}).values())
    if not groups:
        raise _nothing(where, dropped)
    groups = [groups[i] for i in generator("split", seed).permutation(len(groups))]
    found = {name: _flat(part.values()) for name, part in clean.items()}
    total = sum(map(len, groups))
    for name, share in (("test", data.test), ("validation", data.validation)):
        if name not in found and share > 0:
            found[name] = []
            while groups and len(found[name]) < max(1, round(share * total)):
                found[name] += groups.pop()
    found["train"] = _flat(groups)[: data.limit]
    if not found["train"] or not found.get("validation"):
        raise DataError(f"{where}: {total:,} conversations are too few to hold any out for validation")
    return Conversations({n: found[n] for n in reversed(SPLITS) if found.get(n)}, where, dict(dropped))


def conversations_to_score(data: DataConfig) -> Conversations:
    """What `to_score` takes of `data`, as one split. Raises DataError: nothing is usable, or there is no such split."""
    source, where = _source(data)
    name, parts = to_score(source, where, data.split)
    dropped: Counter[str] = Counter()
    found = _flat(_clean((row for part in parts for row in part), set(), dropped).values())
    if not found:
        raise _nothing(where, dropped)
    return Conversations({name: found}, where, dict(dropped))


def _source(data: DataConfig) -> tuple[Mapping[str, Sequence[Mapping[str, Any]]], str]:
    return corpus() if data.path == CORPUS else read_source(data)


def _nothing(where: str, dropped: Mapping[str, int]) -> DataError:
    reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "there are no rows"
    return DataError(f"{where}: no usable conversation ({reasons}); wanted: {KINDS}")


def _flat(groups: Iterable[Iterable[Conversation]]) -> list[Conversation]:
    return [talk for group in groups for talk in group]


def _clean(
    rows: Iterable[Mapping[str, Any]], claimed: set[str], dropped: Counter[str]
) -> dict[str, list[Conversation]]:
    """Opening question -> the conversations that start with it. `claimed`: questions of the splits that went before."""
    found: dict[str, list[Conversation]] = {}
    for row in rows:
        try:
            talk = as_messages(row)
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        opening = next(m["content"] for m in talk if m["role"] == "user").lower()
        if opening in claimed:
            dropped["that ask what a held-out one asks"] += 1
        elif talk in found.get(opening, ()):
            dropped["twice there"] += 1
        else:
            found.setdefault(opening, []).append(talk)
    claimed.update(found)
    return found


def corpus() -> tuple[dict[str, list[Any]], str]:
    """The English dialogues of the package chatterbot-corpus (BSD), as rows of messages. The package is read, not run.

    Raises:
        DataError: it is not installed.
    """
    try:
        package = distribution(CORPUS)
    except PackageNotFoundError:
        raise DataError(f"data={CORPUS}: install it with `pip install {CORPUS}==1.3.3`, or give data=FILE") from None
    files = [Path(str(package.locate_file(f))) for f in package.files or () if f.match("data/english/*.yml")]
    rows: list[Any] = []
    for file in sorted(files):
        for lines in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(lines) > LONGEST:
                rows.append({})
                continue
            used = lines if file.stem in TALKS else lines[:2]
            turns = [{"role": ("user", "assistant")[i % 2], "content": line} for i, line in enumerate(used)]
            rows.append({"messages": turns})
    return {"train": rows}, f"{CORPUS} {package.version}, {len(rows):,} English dialogues"
