"""Two threads, one model, different adapters at the same time; copies, pickles and state dicts of adapted models."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.registry import variants

from .conftest import shaken

VARIANTS = [v for _, cls in variants.items() for v in cls.examples()]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def model_of(variant, names=("a", "b")) -> nn.Module:
    torch.manual_seed(0)
    model = Model().double()
    for name in names:
        dw.attach(model, variant, targets=["first", "second"], train=[] if variant.any_shape else ["norm"], name=name)
    return shaken(model)


def in_threads(*jobs: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_threads_with_different_adapters(variant):
    model = model_of(variant).eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    choices = ["a", "b", None, {"a": 0.5, "b": -1.0}]
    expected = []
    for choice in choices:
        with dw.use(model, choice):
            expected.append(model(x).detach())
    meet = threading.Barrier(len(choices))

    def job(i: int) -> Callable[[], None]:
        def run() -> None:
            meet.wait()
            for turn in range(30):
                with dw.use(model, choices[i]):
                    assert torch.equal(model(x), expected[i])
                    with dw.use(model, choices[turn % 4]):
                        assert torch.equal(model(x), expected[turn % 4])
                    with pytest.raises(ZeroDivisionError), dw.use(model, choices[turn % 4]):
                        _ = 1 / 0
                    assert torch.equal(model(x), expected[i])

        return run

    in_threads(*(job(i) for i in range(len(choices))))


def test_threads_in_rows_and_outside_of_them():
    model = model_of(dw.LoRA(rank=2)).eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    with dw.use(model, "a"):
        only_a = model(x).detach()
    mixes = [["a", "b", None, "a"], ["b", "b", "a", None]]
    expected = []
    for mix in mixes:
        with dw.rows(model, mix, how="split"):
            expected.append(model(x).detach())
    meet = threading.Barrier(3)

    def mixed(i: int) -> None:
        meet.wait()
        for turn in range(30):
            with dw.rows(model, mixes[i], how=["one pass", "split", "auto"][turn % 3]):
                torch.testing.assert_close(model(x), expected[i], rtol=1e-12, atol=1e-12)

    def plain() -> None:
        meet.wait()
        for _ in range(60):
            with dw.use(model, "a"):
                assert torch.equal(model(x), only_a)

    in_threads(lambda: mixed(0), lambda: mixed(1), plain)
    assert "forward" not in model.__dict__


def test_threads_train_their_own_adapters():
    model = model_of(dw.LoRA(rank=2)).eval()
    x = torch.randn(4, 6, dtype=torch.float64)

    def gradients(name: str) -> dict[str, torch.Tensor]:
        mine = {n: p for n, p in model.named_parameters() if f".{name}." in n and p.requires_grad}
        with dw.use(model, name):
            found = torch.autograd.grad(model(x).square().sum(), list(mine.values()))
        return dict(zip(mine, found))

    expected = {name: gradients(name) for name in "ab"}
    meet = threading.Barrier(2)

    def run(name: str) -> None:
        meet.wait()
        for _ in range(30):
            for key, value in gradients(name).items():
                torch.testing.assert_close(value, expected[name][key], rtol=1e-12, atol=1e-12)

    in_threads(lambda: run("a"), lambda: run("b"))


# ---- copies


def answers(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = [model(x)]
    for choice in ("a", "b", None):
        with dw.use(model, choice):
            found.append(model(x))
    return found


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved(model),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # a copy made by this very test


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_copies_answer_alike_and_live_their_own_lives(variant, how):
    model = model_of(variant).eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    with dw.rows(model, ["a", "b", None, "a"]):
        model(x)
    dw.activate(model, "a")
    before = answers(model, x)
    with dw.use(model, "b"):
        twin = COPIES[how](model)
    for found, expected in zip(answers(twin, x), before):
        assert torch.equal(found, expected)
    dw.activate(twin, "b")
    shaken(twin)
    for found, expected in zip(answers(model, x), before):
        assert torch.equal(found, expected)
    dw.detach(twin)
    assert type(twin.first) is nn.Linear
    assert [s.name for s in dw.adapters(model)] == ["a", "b"]
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_state_dict_round_trip(variant):
    model = model_of(variant).eval()
    plain = Model().double().state_dict()
    state = model.state_dict()
    assert set(plain) <= set(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = shaken(model_of(variant), seed=9).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 6, dtype=torch.float64)
    for found, expected in zip(answers(other, x), answers(model, x)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
