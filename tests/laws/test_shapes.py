"""Laws 1-3 and 5 where nobody chose the shapes: Hypothesis draws layers, ranks, scales, targets and inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deltaw as dw
from tests.laws.conftest import shaken

SIZES = st.integers(1, 12)
CALM = settings(max_examples=60, deadline=None)
ROUNDINGS = 1e-11
"""float64, relative to the largest output."""


@st.composite
def layers(draw):
    """A layer with an input for it."""
    kind = draw(st.sampled_from(["linear", "conv1d", "conv2d", "transposed", "embedding", "gru"]))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    i, o, batch = draw(SIZES), draw(SIZES), draw(st.integers(1, 3))
    if kind == "linear":
        return nn.Linear(i, o, bias=draw(st.booleans())), torch.randn(
            *draw(st.sampled_from([(i,), (batch, i), (2, 3, i)]))
        )
    if kind == "embedding":
        return nn.Embedding(i, o, padding_idx=draw(st.sampled_from([None, 0]))), torch.randint(i, (batch, 4))
    if kind == "gru":
        return nn.GRU(i, o, batch_first=draw(st.booleans()), bidirectional=draw(st.booleans())), torch.randn(2, 3, i)
    groups = draw(st.integers(1, 3))
    options = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if kind == "conv2d":
        return nn.Conv2d(i * groups, o * groups, **options), torch.randn(batch, i * groups, 7, 8)
    cls = nn.Conv1d if kind == "conv1d" else nn.ConvTranspose1d
    return cls(i * groups, o * groups, **options), torch.randn(batch, i * groups, 9)


@st.composite
def variants(draw):
    """A method with its options."""
    cls = draw(st.sampled_from([dw.LoRA, dw.DoRA]))
    return cls(
        rank=draw(st.integers(1, 14)),
        alpha=draw(st.floats(0.1, 30)),
        scaling=draw(st.sampled_from(["alpha/rank", "alpha/sqrt(rank)", "alpha"])),
        init=draw(st.sampled_from(["kaiming", "gaussian", "gaussian/sqrt(rank)"])),
        bias=draw(st.booleans()),
    )


def first(output):
    return output[0] if isinstance(output, tuple) else output


@CALM
@given(layers(), variants())
def test_any_layer_with_any_rank(drawn, variant):
    layer, x = drawn
    model = nn.Sequential(layer).double().eval()
    x = x.double() if x.is_floating_point() else x
    before, plain = first(model(x)), {k: v.clone() for k, v in model.state_dict().items()}
    dw.attach(model, variant, targets=["0"])
    assert torch.equal(first(model(x)), before)
    shaken(model)
    out = first(model(x))
    dw.merge(model)
    size = max(1.0, float(out.detach().abs().max()) if out.numel() else 0.0)
    assert out.numel() == 0 or float((first(model(x)) - out).detach().abs().max()) <= ROUNDINGS * size
    dw.unmerge(model)
    assert torch.equal(first(model(x)), out)
    dw.detach(model)
    assert type(model[0]) is type(layer)
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())
    assert torch.equal(first(model(x)), before)


@CALM
@given(st.lists(st.sampled_from(["a", "b", "a.q", "b.q", "q", "k", "b.k"]), min_size=1, max_size=4), st.integers(0, 99))
def test_any_set_of_targets_changes_what_it_names_and_nothing_else(names, seed):
    torch.manual_seed(seed)
    model = nn.ModuleDict({block: nn.ModuleDict({n: nn.Linear(3, 3) for n in ("q", "k")}) for block in ("a", "b")})
    paths = ["a.q", "a.k", "b.q", "b.k"]
    wanted = {p for p in paths for n in names if p == n or p.endswith("." + n)}
    containers = {"a", "b"} & set(names)
    if containers:
        before = {n: type(m) for n, m in model.named_modules()}
        with pytest.raises(dw.errors.TargetError, match="container"):
            dw.attach(model, dw.LoRA(rank=1), targets=names)
        assert {n: type(m) for n, m in model.named_modules()} == before
        return
    dw.attach(model, dw.LoRA(rank=1), targets=names)
    assert {r.key.removesuffix(".weight") for r in dw.summary(model).rows} == wanted
    assert {n.split(".adapters")[0] for n, p in model.named_parameters() if p.requires_grad} == wanted
