"""A frozen body computed once: the same training as computing it every time, and only what the head reads is kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.prefix import Prefix, is_frozen
from deltaw.training.run import train
from tests.tiny_text import make_data, make_model


def test_training_the_head_is_the_same_with_and_without(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.csv", 60)
    kept = []
    for cached in (True, False):
        config = build(
            {
                "recipe": "text-classification",
                "method": "head",
                "model": str(tmp_path / "model"),
                "data": str(tmp_path / "data.csv"),
                "epochs": 2,
                "cache_prefix": cached,
                "base_dropout": 0.0,
            }
        )
        results = train(
            lambda config=config: recipes["text-classification"].task(config),
            config,
            tmp_path / str(cached),
            quiet=True,
        )
        kept.append((results["test"]["loss"], load_file(tmp_path / str(cached) / "adapter_model.safetensors")))
    (one_loss, one), (other_loss, other) = kept
    assert one_loss == pytest.approx(other_loss, rel=1e-5)
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


class Body(nn.Module):
    """Returns more than any head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        states = self.layer(x)
        return {"states": states, "unread": states * 2, "pooled": states.mean(1)}


def answer_of(body, read):
    return lambda x: read(body(x))


@pytest.mark.parametrize(
    ("read", "kept"),
    [
        (lambda o: o["pooled"], {"states": "none", "unread": "none", "pooled": "all"}),
        (lambda o: o["states"][:, 0], {"states": "first", "unread": "none", "pooled": "none"}),
        (lambda o: o["states"].sum(1), {"states": "all", "unread": "none", "pooled": "none"}),
    ],
)
def test_only_what_is_read_is_kept_and_played_back(read, kept):
    torch.manual_seed(0)
    body = Body()
    x = torch.randn(3, 5, 4)
    answer = answer_of(body, read)
    expected = answer(x)
    prefix = Prefix(body, answer)
    rows = prefix.record(x, None)
    assert prefix.kept == kept
    calls = body.calls
    with prefix.playing([rows[2], rows[0]]):
        assert torch.equal(answer(x[[2, 0]]), expected[[2, 0]])
    assert body.calls == calls, "the body did not run"
    assert torch.equal(answer(x), expected), "and runs again afterwards"


def test_rows_of_different_lengths_are_cut_and_padded():
    body = Body()
    answer = answer_of(body, lambda o: o["states"].sum(1))
    rows = Prefix(body, answer).record(torch.randn(2, 5, 4), [5, 3])
    assert [tuple(r["states"].shape) for r in rows] == [(5, 6), (3, 6)]


def test_a_body_that_is_called_twice_or_returns_something_else_is_refused():
    body = Body()
    with pytest.raises(TypeError, match="called 2 times"):
        Prefix(body, lambda x: body(x)["pooled"] + body(x)["pooled"]).record(torch.randn(2, 5, 4), None)
    pair = nn.LSTM(4, 3)
    with pytest.raises(TypeError, match="returns tuple"):
        Prefix(pair, lambda x: pair(x)[0]).record(torch.randn(2, 5, 4), None)


def test_frozen_means_every_parameter():
    body = Body()
    assert not is_frozen(body)
    body.requires_grad_(False)
    assert is_frozen(body)
