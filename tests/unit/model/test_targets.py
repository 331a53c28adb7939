"""Targeting: every kind of pattern, layer ranges, exclusions, and the report of what each pattern matched (issue 3)."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import TargetError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v_proj(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Q = [f"blocks.{i}.q_proj.weight" for i in range(3)]
V = [f"blocks.{i}.v_proj.weight" for i in range(3)]
VARIANT = dw.LoRA(rank=2)


def changed(model: nn.Module) -> list[str]:
    return sorted(row.key for row in dw.summary(model).rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "q_proj"}, Q),
        ({"targets": ["0.q_proj", "blocks.2.v_proj"]}, [Q[0], V[2]]),
        ({"targets": r"blocks\.[12]\.(q|v)_proj"}, [*Q[1:], *V[1:]]),
        ({"targets": nn.Linear, "exclude": ["head", "v_proj"]}, Q),
        ({"targets": lambda path, layer: path.endswith("1.v_proj")}, [V[1]]),
        ({}, ["head.weight", *Q, *V]),
        ({"layers": [0, 2]}, [Q[0], Q[2], V[0], V[2]]),
        ({"targets": "q_proj", "layers": range(1, 3)}, Q[1:]),
        ({"targets": "q_proj", "train": "head"}, [*Q, "head.weight", "head.bias"]),
        ({"targets": "q_proj", "train": ["1.norm", "v_proj.bias"]}, ["blocks.1.norm.weight", "blocks.1.norm.bias"]),
    ],
)
def test_what_is_meant(options, expected):
    model = Model()
    dw.attach(model, VARIANT, **options)
    if options.get("train") == ["1.norm", "v_proj.bias"]:
        expected = [*Q, *expected, *(v.replace("weight", "bias") for v in V)]
    assert changed(model) == sorted(expected)


def test_norms_biases_and_rows_of_an_embedding_by_the_general_form():
    model = Model()
    dw.attach(
        model, {"v_proj": VARIANT, nn.LayerNorm: dw.Full(), "embed": dw.Rows(indices=(3, 5)), "head.bias": dw.Full()}
    )
    assert changed(model) == sorted(
        [*V, *(f"blocks.{i}.norm.{s}" for i in range(3) for s in ("weight", "bias")), "embed.weight", "head.bias"]
    )
    base = model(torch.tensor([3, 4])).detach()
    with torch.no_grad():
        model.embed.deltas("default")["weight"].value.add_(1.0 + torch.arange(4))
    out = model(torch.tensor([3, 4]))
    assert not torch.allclose(out[0], base[0])
    assert torch.equal(out[1], base[1])


def test_the_summary_says_how_many_modules_each_pattern_matched():
    model = Model()
    dw.attach(model, {"q_proj|v_proj": VARIANT, nn.Embedding: VARIANT, "head": dw.Full()}, name="a")
    dw.attach(model, VARIANT, ["q_proj", r"blocks\.1\.v_proj"], train=["norm"], name="b")
    found = dw.summary(model)
    assert found.matched["a"] == {"targets='q_proj|v_proj'": 6, "targets=Embedding": 1, "targets='head'": 1}
    assert found.matched["b"] == {"train='norm'": 3, "targets='q_proj'": 3, r"targets='blocks\\.1\\.v_proj'": 1}
    assert "a: targets='q_proj|v_proj' matched 6 modules, targets=Embedding matched 1 module," in str(found)
    dw.rename(model, "a", "c")
    dw.detach(model, "b")
    assert list(dw.summary(model).matched) == ["c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["q_proj", "k_prj"]}, "targets='k_prj' matches no layer of Model; closest: '(q|v)_proj'"),
        ({"targets": "q_proj", "layers": [7]}, r"none is left after exclude=\(\), layers=\[7\]"),
        ({"targets": "q_proj", "exclude": "q_projj"}, "exclude='q_projj' matches no layer of Model; closest: 'q_proj'"),
        ({"targets": "q_proj", "train": ["proj"]}, "train='proj' matches no module of Model"),
        ({"targets": "q_proj", "train": ["norm|head"]}, "train= takes exact names, no patterns"),
        ({"targets": "q_proj", "train": [3]}, r"train=\[3\]: give names of modules"),
        ({"targets": "q_proj", "layers": 1}, r"layers=1: give the indices of blocks, for example layers=\[0, 1\]"),
        ({"targets": "q_proj", "layers": "01"}, r"layers='01': give the indices"),
        ({"targets": "blocks"}, "'blocks' matches only containers .*name layers inside, for example 'blocks.0.q_proj'"),
        ({"targets": "norm"}, r"'blocks.0.norm', a LayerNorm, which LoRA cannot adapt.*train=\['blocks.0.norm'\]"),
    ],
)
def test_what_matches_nothing_is_an_error_and_changes_nothing(options, words):
    model = Model()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError) as error:
        dw.attach(model, VARIANT, **options)
    assert re.search(words, str(error.value)), str(error.value)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model.blocks[0].q_proj) is nn.Linear
