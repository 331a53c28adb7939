"""Schedule, scores, verdict, chart, record: the parts of a run that are pure functions."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from deltaw.training.chart import chart, ticks
from deltaw.training.record import Record, read_record
from deltaw.training.schedule import factor
from deltaw.training.task import area_under_curve
from deltaw.training.verdict import compared, markdown, size, table, verdict


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_rate_rises_then_falls(shape):
    rates = [factor(s, 100, 0.1, shape) for s in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(
        {"linear": 1 / 90, "cosine": 0.5 * (1 + math.cos(math.pi * 89 / 90)), "constant": 1.0}[shape]
    )


def test_without_warmup_the_first_step_has_the_full_rate():
    assert factor(0, 10, 0.0, "linear") == 1.0


def test_area_under_curve_is_scikit_learns_with_ties():
    torch.manual_seed(0)
    label = torch.randint(0, 2, (301,))
    score = (torch.randn(301) + label).round(decimals=1)
    assert area_under_curve(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert math.isnan(area_under_curve(score, torch.zeros(301)))


def run(method: str, score: float, kept: int, seed: int = 0, trainable: int = 10) -> dict:
    history = [
        {"epoch": 1.0, "step": 5, "seconds": 2.0, "loss": 0.7, "accuracy": score - 0.1},
        {"epoch": 2.0, "step": 10, "seconds": 4.0, "loss": 0.6, "accuracy": score},
    ]
    return {
        "method": method, "metric": "accuracy", "higher_is_better": True, "best": history[1], "test": {"accuracy": score}, "history": history,
        "parameters": {"trainable": trainable, "share": 0.1}, "seconds": 4.0, "peak_bytes": 5_000_000, "peak_above_model_bytes": 1_000, "kept_bytes": kept, "seed": seed,
    }  # fmt: skip


def test_the_verdict_takes_the_smallest_of_the_equally_good():
    rows = compared([run("head", 0.65, 10), run("lora", 0.81, 1_000), run("full", 0.82, 90_000)])
    take, why = verdict(rows, "accuracy", examples=600)
    assert take == "lora"
    assert "within the noise" in why
    assert "90.0 kB" in why


def test_the_verdict_takes_the_best_where_it_is_clearly_better():
    take, why = verdict(compared([run("lora", 0.6, 1_000), run("full", 0.9, 90_000)]), "accuracy", examples=600)
    assert take == "full"
    assert "best validation accuracy (0.9000; next is lora with 0.6000)" in why


def test_seeds_are_averaged():
    (row,) = compared([run("lora", 0.8, 10), run("lora", 0.9, 10, seed=1)])
    assert row.score == pytest.approx(0.85)
    assert row.spread == pytest.approx(0.0707, abs=1e-4)
    assert "0.8500 ± 0.0707" in markdown([row], "accuracy")
    assert len(table([row], "accuracy")[0]) == len(table([row], "accuracy")[1])


def test_sizes_read_well():
    assert [size(n) for n in (0, 999, 1_000, 14_200, 176_000, 90_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "14.2 kB",
        "176 kB",
        "90.0 MB",
    ]


def test_ticks_enclose_the_data_with_round_steps():
    assert ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    low, *_, high = ticks(0.613, 0.827, 5)
    assert low <= 0.613
    assert high >= 0.827


def test_a_chart_holds_every_line_and_escapes_names():
    svg = chart([("a<b", [(1.0, 0.5), (2.0, 0.6)]), ("level", [(0.0, 0.4)])], "epoch", "accuracy")
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 2
    assert "a&lt;b" in svg
    assert "a<b" not in svg


def test_a_record_can_be_cut_back(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    record.write({"step": 1})
    kept = record.flush()
    record.write({"step": 2})
    record.cut(kept)
    record.write({"step": 3})
    record.close()
    assert read_record(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
