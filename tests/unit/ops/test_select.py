"""The rules by which kernels are chosen, and the record of choices."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ConfigError
from deltaw.ops import select


def test_merging_is_chosen_where_it_is_less_work() -> None:
    for out, width in [(384, 384), (1536, 384), (49152, 576)]:
        bound = out * width / (out + width)
        assert select.use_merged(out, width, int(bound) + 1, torch.float32)
        assert not select.use_merged(out, width, int(bound) - 1, torch.float32)
        assert not select.use_merged(out, width, 10**6, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "kernel", "reason"),
    [
        ({}, "merged", "3200 rows > in·out/(in+out) = 192"),
        ({"dropout": 0.05}, "added", "dropout 0.05"),
        ({"dtype": torch.bfloat16}, "added", "bfloat16 would round"),
        ({"form": "nf4"}, "added", "kept as nf4"),
        ({"form": "int8", "device": "cuda"}, "added", "no 8-bit kernels"),
    ],
)
def test_the_explanation_names_kernel_and_reason(options: dict, kernel: str, reason: str) -> None:
    found = select.explain(384, 384, 3200, 8, **options)
    assert found.kernel == kernel
    assert reason in str(found)
    assert 0 < found.share < 0.1


def test_few_rows_are_added() -> None:
    assert "the factors are cheaper" in select.explain(384, 384, 10, 8).reason


def test_choices_survive_the_file() -> None:
    choices = select.Choices({(384, 1536, 1024): (True, False), (8, 8, 1): (False, False)})
    assert select.Choices.from_json(choices.to_json()) == choices


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"kernels": [{"shape": [1, 2], "int8": [true]}]}'])
def test_a_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a record of kernel choices"):
        select.Choices.from_json(text)


def test_a_recorded_choice_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "int8_available", lambda: True)
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(select, "time_int8", lambda *shape: (calls.append(shape), (True, False))[1])
    choices = select.Choices()
    assert choices.choose(16, 8, 100) == (True, False)
    assert choices.choose(16, 8, 128) == (True, False)  # the same power of two
    assert calls == [(16, 8, 128)]
    monkeypatch.setattr(select, "int8_available", lambda: False)
    assert choices.choose(16, 8, 128) == (False, False)


@pytest.mark.skipif(not select.int8_available(), reason="no VNNI on this processor")
def test_timing_answers_for_both_products() -> None:
    answer = select.time_int8(24, 16, 8, repeats=1)
    assert [type(a) for a in answer] == [bool, bool]
