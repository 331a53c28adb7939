"""Everything that the documents this project grew from show, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deltaw as dw


def notebook_layer():
    """The first document's example: seed 123, a Linear(10, 2), one input."""
    torch.manual_seed(123)
    layer = nn.Linear(10, 2)
    return layer, torch.randn((1, 10))


SEED_LORA = {"rank": 2, "alpha": 4, "scaling": "alpha", "init": "gaussian/sqrt(rank)"}


def test_the_notebook_layer_is_unchanged_by_a_fresh_adapter_added_or_merged():
    layer, x = notebook_layer()
    expected = torch.tensor([[0.6639, 0.4487]])
    before = layer(x)
    assert torch.allclose(before, expected, atol=5e-5)  # printed with four digits
    model = nn.Sequential(layer)
    dw.attach(model, dw.LoRA(**SEED_LORA), targets=["0"])
    assert torch.equal(model(x), before)
    with dw.merged(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_added_and_merged_agree_once_trained():
    layer, x = notebook_layer()
    model = nn.Sequential(layer)
    dw.attach(model, dw.LoRA(**SEED_LORA), targets=["0"])
    change = model[0].adapters._modules["default"]._modules["weight"]
    with torch.no_grad():
        change.B.normal_()
    added = model(x)
    A, B = change.A.double(), change.B.double()
    by_hand = x.double() @ layer.weight.double().T + layer.bias.double() + 4 * (x.double() @ A.T @ B.T)
    assert torch.allclose(added.double(), by_hand, atol=1e-5)
    with dw.merged(model):
        assert torch.allclose(model(x), added, atol=1e-5)


def multilayer_perceptron():
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))


def test_weights_and_biases_are_frozen_and_factors_trained():
    model = nn.Module()
    model.layers = multilayer_perceptron()
    dw.attach(model, dw.LoRA(rank=4, alpha=8, scaling="alpha"), targets=["layers.0", "layers.2", "layers.4"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for index in (0, 2, 4):
        assert flags.pop(f"layers.{index}.weight") is False
        assert flags.pop(f"layers.{index}.bias") is False
    assert len(flags) == 6
    assert all(flags.values())
    assert {name.rpartition(".")[2] for name in flags} == {"A", "B"}
    assert "LoRA(rank=4, alpha=8, scaling='alpha')" in str(model)


@pytest.mark.parametrize(("columns", "rows", "rank", "count"), [(1000, 1000, 2, 4_000), (10_000, 5_000, 8, 120_000)])
def test_parameter_counts(columns, rows, rank, count):
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, device="meta"))
    dw.attach(model, dw.LoRA(rank=rank), targets=["0"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert model[0].weight.numel() == rows * columns


@pytest.mark.parametrize(
    ("scaling", "scale"), [("alpha/rank", 16 / 8), ("alpha/sqrt(rank)", 16 / math.sqrt(8)), ("alpha", 16.0)]
)
def test_scale_rules(scaling, scale):
    assert dw.LoRA(rank=8, alpha=16, scaling=scaling).scale == scale
    assert dw.LoRA(rank=8).scale == 2.0  # alpha is 2 x rank unless said


def test_dropout_on_the_output_is_the_third_documents():
    """x1 + dropout(alpha · x A B): dropped entries leave the base's output, kept ones are scaled by 1/(1-p)."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 100)
    model = nn.Sequential(layer)
    dw.attach(model, dw.LoRA(rank=8, alpha=16, scaling="alpha", dropout=0.25, dropout_at="output"), targets=["0"])
    with torch.no_grad():
        model[0].adapters._modules["default"]._modules["weight"].B.normal_()
    x = torch.randn(200, 50)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    change = model.eval()(x) - base
    dropped = model.train()(x) - base
    zero = dropped.abs() < 1e-4 * change.abs()
    assert abs(float(zero.float().mean()) - 0.25) < 0.02  # 20,000 draws: 6 standard deviations
    kept = ~zero & (change.abs() > 1e-2)
    assert torch.allclose(dropped[kept], change[kept] / 0.75, rtol=1e-2)


def test_deberta_v3_large_counts_are_the_seeds_and_pefts():
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.DebertaV2Config(
        vocab_size=128100,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        layer_norm_eps=1e-7,
        position_biased_input=False,
        max_relative_positions=-1,
        pooler_hidden_size=1024,
    )

    def build():
        with torch.device("meta"):
            return transformers.AutoModelForSequenceClassification.from_config(config)

    model = build()
    assert sum(p.numel() for p in model.parameters()) == 435_063_810
    variant = dw.LoRA(rank=8, alpha=16, dropout=0.05, dropout_at="output")
    dw.attach(model, variant, targets=["query_proj", "value_proj"], train=["classifier"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 788_482
    theirs = peft.get_peft_model(
        build(),
        peft.LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["query_proj", "value_proj"],
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        ),
    )
    assert theirs.get_nb_trainable_parameters()[0] == 788_482
