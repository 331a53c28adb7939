"""The search over weights: it finds what is there, repeats, resumes, and says when it fails."""

import json
import math
import threading

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw import errors
from deltaw.compose.hub import BASE, measured, search
from deltaw.compose.hub_plot import plot

pytest.importorskip("nevergrad")
NAMES = ("a", "b", "c")
TARGET = (0.8, -0.5, 0.0)


def bowl(weights):
    return sum((w - t) ** 2 for w, t in zip(weights, TARGET))


def test_finds_the_weights_and_says_that_it_beats_all():
    found = search(NAMES, bowl, steps=120, l1=0.0)
    assert found.best.loss < 0.02
    assert found.best.weights == pytest.approx(TARGET, abs=0.15)
    assert found.baselines[BASE] == pytest.approx(bowl((0, 0, 0)))
    assert found.baselines["b"] == pytest.approx(bowl((0, 1, 0)))
    assert found.beats_all
    assert "beats the base and every single adapter" in found.verdict


def test_says_when_it_does_not():
    found = search(NAMES, lambda w: 0.0 if w == (0.0, 1.0, 0.0) else 1 + bowl(w), steps=10)
    assert not found.beats_all
    assert "does NOT beat the best single one" in found.verdict
    assert "best of them: b" in found.verdict


def test_stays_within_bounds_and_prefers_small_weights():
    found = search(NAMES, lambda w: -w[0], steps=60, bound=0.5, l1=0.1)
    assert all(abs(w) <= 0.5 for s in found.steps for w in s.weights)
    assert found.best.weights[0] > 0.3


def test_repeats_with_a_seed_and_differs_with_another():
    one, same, other = (search(NAMES, bowl, steps=15, seed=s, optimizer="OnePlusOne") for s in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize("cut", [0, 2, 9, 17])
def test_goes_on_from_its_trace(tmp_path, cut):
    whole = search(NAMES, bowl, steps=15, seed=3, trace=tmp_path / "whole.jsonl")
    calls = []
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[: 1 + cut]) + (lines[1 + cut][:7] if cut else ""))
    again = search(NAMES, lambda w: calls.append(w) or bowl(w), steps=15, seed=3, trace=tmp_path / "cut.jsonl")
    assert again == whole
    assert len(calls) == 15 + 4 - cut
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_trace_of_another_search_is_refused_and_left_alone(tmp_path):
    trace = tmp_path / "trace.jsonl"
    search(NAMES, bowl, steps=5, trace=trace)
    before = trace.read_bytes()
    with pytest.raises(errors.ConfigError, match=r"another search \(steps differ"):
        search(NAMES, bowl, steps=6, trace=trace)
    assert trace.read_bytes() == before
    trace.write_text("not json\n")
    with pytest.raises(errors.ConfigError, match="line 1 is not JSON"):
        search(NAMES, bowl, steps=5, trace=trace)


def test_threads_do_not_change_the_result():
    seen = set()
    barrier = threading.Barrier(3)

    def slow(weights):
        seen.add(threading.get_ident())
        if len([w for w in weights if w]) == 3:  # a searched point: three at a time
            barrier.wait(timeout=30)
        return bowl(weights)

    assert search(NAMES, slow, steps=12, workers=3) == search(NAMES, bowl, steps=12, workers=3)
    assert len(seen) == 3


def test_infinite_losses_are_survived_unless_all_are():
    found = search(NAMES, lambda w: math.nan if w[0] < 0 else bowl(w), steps=30)
    assert math.isfinite(found.best.loss)
    json.dumps(found.facts(), allow_nan=False)
    with pytest.raises(errors.DataError, match="not finite for the base"):
        search(NAMES, lambda w: math.nan, steps=3)


def test_on_a_model_uses_the_weighted_sum_of_changes_and_leaves_it_as_it_was():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    names = []
    for n in range(2):
        change = dw.Change(
            dw.LoRA(rank=2, alpha=2),
            {"A": torch.randn(2, 6, generator=g), "B": torch.randn(4, 2, generator=g)},
            "linear",
        )
        dw.install(model, dw.Adapter({"0.weight": change}), name=f"t{n}", active=False)
        names.append(f"t{n}")
    deltas = [dw.get(model, n).changes["0.weight"].delta_weight() for n in names]
    x = torch.randn(32, 6, generator=g)
    plain = model(x).detach()
    goal = x @ (model[0].weight.detach() + 0.7 * deltas[0] - 0.6 * deltas[1]).T

    def loss(m):
        with torch.no_grad():
            return float((m(x) - goal).square().mean())

    found = search(names, measured(model, names, loss), steps=80, l1=0.0)
    assert found.best.weights == pytest.approx((0.7, -0.6), abs=0.1)
    assert found.beats_all
    assert torch.equal(model(x).detach(), plain)


def test_draws_its_trace(tmp_path):
    plot(search(NAMES, bowl, steps=12), tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_bad_options():
    with pytest.raises(errors.ConfigError, match="steps=0"):
        search(NAMES, bowl, steps=0)
    with pytest.raises(errors.ConfigError, match="different names"):
        search(("a", "a"), bowl)
    with pytest.raises(errors.ConfigError, match="none of nevergrad's"):
        search(NAMES, bowl, optimizer="Gradient")
