"""Every layer family beside PEFT, with the same factors: equal outputs where PEFT is right; its faults, where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from tests.laws.conftest import shaken

peft = pytest.importorskip("peft")
RANK, ALPHA = 4, 6


class One(nn.Module):
    """A model of one layer, called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def theirs(model: nn.Module, **options) -> nn.Module:
    """PEFT's LoRA around a copy of `model`, in float64."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **{"target_modules": ["layer"], **options})
    return peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).double().eval()


def give(mine: nn.Module, other: nn.Module, pairs: dict[str, tuple[str, str]]) -> None:
    """Copy our A and B of each parameter into PEFT's tensors, reshaped to their form; `pairs`: key -> names of A and B."""
    known = dict(other.named_parameters())
    adapter = dw.get(mine)
    with torch.no_grad():
        for key, (a, b) in pairs.items():
            tensors = adapter.changes[key].tensors
            for name, tensor in ((a, tensors["A"]), (b, tensors["B"])):
                found = [n for n in known if n.endswith(name)]
                assert len(found) == 1, (name, sorted(known))
                known[found[0]].copy_(tensor.reshape(known[found[0]].shape))
            if "m" in tensors:
                found = [n for n in known if "lora_magnitude_vector" in n]
                known[found[0]].copy_(tensors["m"].reshape(known[found[0]].shape))


PLAIN = {"layer.weight": ("lora_A.default.weight", "lora_B.default.weight")}
EMBEDDING = {"layer.weight": ("lora_embedding_A.default", "lora_embedding_B.default")}


def conv1d_gpt2() -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(10, 6)


def tokens() -> torch.Tensor:
    return torch.tensor([[1, 4, 1], [0, 10, 4]])


CASES = {
    "linear": (lambda: nn.Linear(6, 10), lambda: torch.randn(2, 3, 6), PLAIN),
    "conv1d_gpt2": (conv1d_gpt2, lambda: torch.randn(2, 3, 6), PLAIN),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=4), tokens, EMBEDDING),
    "conv1d": (lambda: nn.Conv1d(3, 10, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 9), PLAIN),
    "conv2d": (lambda: nn.Conv2d(3, 10, (3, 2), padding=(1, 0)), lambda: torch.randn(2, 3, 6, 5), PLAIN),
    "conv2d 1x1": (lambda: nn.Conv2d(3, 10, 1), lambda: torch.randn(2, 3, 6, 5), PLAIN),
    "conv3d": (lambda: nn.Conv3d(2, 8, 3, padding=1), lambda: torch.randn(1, 2, 4, 4, 4), PLAIN),
}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("family", CASES)
def test_equal_outputs_and_equal_merged_weights(family, dora):
    build, args, pairs = CASES[family]
    torch.manual_seed(0)
    plain, x = One(build()).double().eval(), args()
    x = x if x.dtype == torch.long else x.double()
    mine = copy.deepcopy(plain)
    variant = (dw.DoRA if dora else dw.LoRA)(rank=RANK, alpha=ALPHA)
    shaken(dw.attach(mine, variant, targets=["layer"]), size=0.1)
    other = theirs(plain, use_dora=dora)
    give(mine, other, pairs)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-9, atol=1e-9)
    merged = other.merge_and_unload()
    dw.merge(mine)
    torch.testing.assert_close(mine.layer.weight, merged.layer.weight, rtol=1e-9, atol=1e-9)


ATTENTION = {
    "layer.in_proj_weight": ("layer.lora_A.default.weight", "layer.lora_B.default.weight"),
    "layer.out_proj.weight": ("out_proj.lora_A.default.weight", "out_proj.lora_B.default.weight"),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("out_proj", ["as it started", "changed"])
def test_multihead_attention(batch_first, out_proj):
    """PEFT 0.21.2 adds the change of out_proj twice (once by hand, once by merging it): ours must be doubled to match."""
    torch.manual_seed(0)
    plain = One(nn.MultiheadAttention(8, 2, batch_first=batch_first)).double().eval()
    x = torch.randn(3, 5, 8).double()
    mine = copy.deepcopy(plain)
    shaken(dw.attach(mine, dw.LoRA(rank=RANK, alpha=ALPHA), targets=["layer"]))
    inner = mine.layer.out_proj.deltas("default")["weight"]
    with torch.no_grad():
        if out_proj == "as it started":
            inner.B.zero_()
        other = theirs(plain)
        give(mine, other, ATTENTION)
        inner.B.mul_(2)
    for a, b in zip(mine(x, x, x), other(x, x, x)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_scaled_embeddings_of_gemma():
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    torch.manual_seed(0)
    plain = One(gemma.Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=2.5)).double().eval()
    mine = copy.deepcopy(plain)
    shaken(dw.attach(mine, dw.LoRA(rank=RANK, alpha=ALPHA), targets=["layer"]))
    other = theirs(plain)
    give(mine, other, EMBEDDING)
    torch.testing.assert_close(mine(tokens()), other(tokens()), rtol=1e-9, atol=1e-9)


def test_expert_parameters_of_mixtral():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    plain = transformers.MixtralForCausalLM(config).double().eval()
    ids = torch.tensor([[1, 5, 9, 30]])
    mine = copy.deepcopy(plain)
    shaken(dw.attach(mine, dw.LoRA(rank=RANK, alpha=ALPHA), targets=["experts.gate_up_proj"]))
    other = theirs(plain, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    tensors = next(iter(dw.get(mine).changes.values())).tensors
    known = {n.rsplit("lora_", 1)[1]: p for n, p in other.named_parameters() if "lora_" in n}
    with torch.no_grad():  # PEFT: rows of A expert by expert, columns of B rank by rank
        known["A.default.weight"].copy_(tensors["A"].flatten(0, 1))
        known["B.default.weight"].copy_(tensors["B"].permute(1, 2, 0).flatten(1))
        torch.testing.assert_close(mine(ids).logits, other(ids).logits, rtol=1e-9, atol=1e-9)


# ---- faults of PEFT 0.21.2 that must not exist here


def test_fault_3_dilated_convolutions_work():
    torch.manual_seed(0)
    plain, x = One(nn.Conv2d(3, 10, 3, padding=2, dilation=2)).double().eval(), torch.randn(2, 3, 7, 7).double()
    with pytest.raises(RuntimeError):
        theirs(plain)(x)
    shaken(dw.attach(plain, dw.LoRA(rank=RANK), targets=["layer"]))
    out = plain(x)
    dw.merge(plain)
    torch.testing.assert_close(plain(x), out, rtol=1e-10, atol=1e-10)


def test_fault_3_padding_mode_is_the_adapters_too():
    torch.manual_seed(0)
    plain, x = (
        One(nn.Conv2d(3, 10, 3, padding=1, padding_mode="reflect")).double().eval(),
        torch.randn(2, 3, 7, 7).double(),
    )
    mine = copy.deepcopy(plain)
    shaken(dw.attach(mine, dw.LoRA(rank=RANK, alpha=ALPHA), targets=["layer"]))
    other = theirs(plain)
    give(mine, other, PLAIN)
    wrong = other(x)
    merged = other.merge_and_unload()(x)
    assert float((wrong - merged).abs().max()) > 0.1  # PEFT's unmerged output pads with zeros
    torch.testing.assert_close(mine(x), merged, rtol=1e-9, atol=1e-9)


def test_fault_6_tied_embeddings_merge_to_what_they_computed():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model = Tied().double().eval()
    other = theirs(model, target_modules=["embed"])
    shaken(other)
    wrong = other(tokens())
    assert not torch.allclose(other.merge_and_unload()(tokens()), wrong)
    shaken(dw.attach(model, dw.LoRA(rank=RANK), targets=["embed"]))
    out = model(tokens())
    dw.merge(model)
    torch.testing.assert_close(model(tokens()), out, rtol=1e-10, atol=1e-10)


def test_fault_14_encoder_layers_are_not_dead_in_eval():
    torch.manual_seed(0)
    plain = One(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).double().eval()
    x = torch.randn(2, 5, 8).double()
    with torch.no_grad():
        before = plain(x)
        other = theirs(plain, target_modules=["linear1"])
        shaken(other)
        other.requires_grad_(False)
        try:
            dead = torch.equal(other(x), before)
        except AttributeError:  # its wrapper hides what the fast path reads
            dead = True
        shaken(dw.attach(plain, dw.LoRA(rank=RANK), targets=["linear1"]))
        assert not torch.allclose(plain(x), before)
    assert dead


def test_fault_16_a_zero_row_stays_finite_under_dora():
    torch.manual_seed(0)
    plain = One(nn.Linear(6, 4)).double().eval()
    with torch.no_grad():
        plain.layer.weight[1] = 0
    x = torch.randn(3, 6).double()
    assert not torch.isfinite(theirs(plain, use_dora=True)(x)).all()
    before = plain(x)
    dw.attach(plain, dw.DoRA(rank=RANK), targets=["layer"])
    assert torch.equal(plain(x), before)
