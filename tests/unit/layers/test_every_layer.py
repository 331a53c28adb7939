"""What must hold for every layer family and is no law over variants: copies, threads, precision, hooks, mixtures."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import deltaw as dw
from tests.laws.conftest import Wrapped, adapted, built, flat, layer_examples, shaken

EXAMPLES = [pytest.param(e, id=f"{family}/{e.label}".replace(" ", "_")) for family, _, e in layer_examples()]


def equal(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("example", EXAMPLES)
def test_deep_copies_and_pickles_compute_the_same_and_stand_alone(example):
    model, args = built(example)
    shaken(adapted(model, dw.LoRA(rank=2))).eval()
    out = model(*args, **example.kwargs)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(twin))
    assert equal(twin(*args, **example.kwargs), out)
    assert equal(again(*args, **example.kwargs), out)
    dw.detach(twin)
    assert equal(model(*args, **example.kwargs), out)
    assert equal(again(*args, **example.kwargs), out)


@pytest.mark.parametrize("example", EXAMPLES)
def test_two_adapters_with_weights_add_up(example):
    model, args = built(example)
    for name, seed in (("a", 1), ("b", 2)):
        adapted(model, dw.LoRA(rank=2) if name == "a" else dw.DoRA(rank=1), name)
        shaken(model, seed)
    model.eval()
    with dw.use(model, {"a": 0.7, "b": -0.3}):
        out = flat(model(*args, **example.kwargs))
    dw.merge(model, {"a": 0.7, "b": -0.3})
    for x, y in zip(flat(model(*args, **example.kwargs)), out):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("example", EXAMPLES)
def test_two_threads_with_two_adapters(example):
    model, args = built(example)
    for name, seed in (("a", 1), ("b", 2)):
        adapted(model, dw.LoRA(rank=2), name)
        shaken(model, seed)
    model.eval()
    expected = {}
    with torch.no_grad():
        for name in ("a", "b"):
            with dw.use(model, name):
                expected[name] = model(*args, **example.kwargs)
    wrong = []
    start = threading.Barrier(2)

    def work(name: str) -> None:
        start.wait()
        with torch.no_grad(), dw.use(model, name):
            for _ in range(5):
                if not equal(model(*args, **example.kwargs), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("example", EXAMPLES)
def test_fp32_factors_over_a_bf16_base_round_once(example):
    model, args = built(example, torch.bfloat16)
    shaken(adapted(model, dw.LoRA(rank=2)), size=0.1).eval()
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if p.requires_grad)
    low = flat(model(*args, **example.kwargs))
    wide = copy.deepcopy(model).double()
    exact = flat(
        wide(
            *(a.double() if hasattr(a, "is_floating_point") and a.is_floating_point() else a for a in args)
            if not any(hasattr(a, "batch_sizes") for a in args)
            else [a.double() for a in args],
            **example.kwargs,
        )
    )
    for x, y in zip(low, exact):
        assert x.dtype == torch.bfloat16 or not x.is_floating_point()
        if x.numel():
            assert float((x.double() - y).abs().max()) <= 16 * 2**-8 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("variant", [dw.LoRA(rank=2, dropout=0.3), dw.DoRA(rank=2, dropout=0.3)], ids=repr)
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_model_that_is_cast_after_attach_computes_and_trains(example, variant):
    model, _ = built(example, torch.float32)
    shaken(adapted(model, variant), size=0.1).bfloat16()
    for training in (False, True):
        out = flat(model.train(training)(*example.args(torch.bfloat16), **example.kwargs))
        sum(t.square().sum() for t in out).backward()
    assert all(t.dtype == torch.bfloat16 and bool(torch.isfinite(t).all()) for t in out)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("example", EXAMPLES)
def test_training_mode_with_dropout_gives_every_tensor_a_gradient(example):
    model, args = built(example)
    shaken(adapted(model, dw.LoRA(rank=3, dropout=0.3))).train()
    out = [t for t in flat(model(*args, **example.kwargs)) if t.numel()]
    if not out:
        return
    sum(t.square().sum() for t in out).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_dropout_is_in_force_in_training_only(example, at):
    model, args = built(example)
    shaken(adapted(model, dw.LoRA(rank=3, dropout=0.5, dropout_at=at)), size=1.0)
    model.eval()
    still = [model(*args, **example.kwargs) for _ in range(2)]
    assert equal(*still)
    if not any(t.numel() for t in flat(still[0])):
        return
    model.train()
    torch.manual_seed(0)
    drawn = [model(*args, **example.kwargs) for _ in range(8)]
    assert any(not equal(drawn[0], d) for d in drawn[1:])


def test_hooks_stay_and_isinstance_holds():
    layer = nn.Conv2d(3, 4, 3)
    calls = []
    layer.register_forward_hook(lambda *a: calls.append(1))
    model = Wrapped(layer)
    dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
    assert isinstance(model.layer, nn.Conv2d)
    assert model.layer is layer
    model(torch.randn(1, 3, 5, 5))
    assert calls == [1]
