"""Every usual kind of row becomes the same conversation; unusable rows are counted with their reason, never trained on."""

from __future__ import annotations

import json

import pytest

from deltaw.errors import DataError
from deltaw.training.config import DataConfig
from deltaw.training.conversations import Unusable, as_messages, conversations

ASKED = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"messages": [ASKED, SAID, {"role": "user", "content": "no answer follows"}]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"conversations": [ASKED, SAID]},
        {"prompt": "Why?", "completion": " Because. "},
        {"prompt": [ASKED], "completion": [SAID]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "output": "Because."},
    ],
)
def test_kinds_of_rows(row):
    assert as_messages(row) == [ASKED, SAID]


def test_system_messages_and_alpacas_input():
    assert as_messages({"messages": [SYSTEM, ASKED, SAID]}) == [SYSTEM, ASKED, SAID]
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert as_messages(row)[0]["content"] == "Translate.\n\nHaus"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "of no known kind"),
        ({"messages": []}, "without an answer"),
        ({"messages": [ASKED]}, "without an answer"),
        ({"messages": [SAID]}, "without a question"),
        ({"messages": [SYSTEM, SAID]}, "without a question"),
        ({"prompt": "Why?", "completion": "  "}, "with an empty message"),
        ({"prompt": "Why?", "completion": None}, "with an empty message"),
        ({"messages": [{"role": "wizard", "content": "x"}, SAID]}, "with an unknown role 'wizard'"),
        ({"messages": [{"content": "x"}, SAID]}, "with a message that lacks 'role' or 'content'"),
    ],
)
def test_unusable_rows_say_why(row, reason):
    with pytest.raises(Unusable, match=reason):
        as_messages(row)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), validation=0.2, test=0.2)


def test_no_question_is_in_two_splits_and_drops_are_counted(tmp_path):
    rows = [{"prompt": f"Question {i // 2}?", "completion": f"Answer {i}."} for i in range(40)]
    rows += [rows[0], {"prompt": "x"}, {"prompt": "y", "completion": ""}]
    found = conversations(written(tmp_path / "talks.jsonl", rows), seed=1)
    assert found.dropped == {"twice there": 1, "of no known kind": 1, "with an empty message": 1}
    assert sum(map(len, found.splits.values())) == 40
    asked = {name: {talk[0]["content"] for talk in talks} for name, talks in found.splits.items()}
    assert all(len(talks) >= 8 for talks in found.splits.values())
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    assert not asked["test"] & asked["validation"]
    again = conversations(written(tmp_path / "talks.jsonl", rows), seed=1)
    assert again.splits == found.splits


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    data = written(tmp_path / "talks.jsonl", [{"prompt": "x", "completion": ""}] * 3)
    with pytest.raises(DataError, match="3 with an empty message"):
        conversations(data, seed=0)


def test_the_corpus_that_installs_as_a_package():
    pytest.importorskip("yaml")
    try:
        found = conversations(DataConfig(path="chatterbot-corpus"), seed=0)
    except DataError as error:
        pytest.skip(str(error))
    assert "2,026 English dialogues" in found.where
    assert sum(map(len, found.splits.values())) == 898
    assert found.dropped == {"twice there": 1127, "of no known kind": 1}
