"""The gradients of equal factors are PEFT's: low-rank tensors and a head trained in full."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import deltaw as dw
from tests.laws.conftest import shaken

THEIRS = {"weight.A": "lora_A.default.weight", "weight.B": "lora_B.default.weight"}


@pytest.mark.parametrize("variant", [dw.LoRA(rank=2, alpha=3), dw.LoRA(rank=3, scaling="alpha/sqrt(rank)")], ids=repr)
def test_gradients_in_a_text_classifier(variant, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    base = transformers.BertForSequenceClassification(config).double().eval()
    ours = copy.deepcopy(base)
    dw.attach(ours, variant, ["query", "dense"], train=["classifier"])
    shaken(ours)
    dw.save(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True).double().eval()

    batch = {"input_ids": torch.randint(1, 20, (3, 6)), "labels": torch.tensor([0, 1, 1])}
    for model in (ours, theirs):
        model(**batch).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(found) == len(expected)
    for name, gradient in found.items():
        path, _, tensor = name.partition(".adapters.default.")
        key = THEIRS.get(tensor, f"modules_to_save.default.{tensor.removesuffix('.value')}")
        torch.testing.assert_close(gradient, expected[f"base_model.model.{path}.{key}"], rtol=1e-10, atol=1e-12)
