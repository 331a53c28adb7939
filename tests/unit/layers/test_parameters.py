"""Raw parameters, named by themselves: the stacked weights of a mixture of experts, each expert with its own factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import TargetError
from tests.laws.conftest import shaken


class Experts(nn.Module):
    """Stacked expert weights with a forward that reads them; `is_transposed` as in transformers."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(*((4, 6, 10) if is_transposed else (4, 10, 6))))
        self.down = nn.Parameter(torch.randn(*((4, 10, 6) if is_transposed else (4, 6, 10))))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        up, down = self.up[expert], self.down[expert]  # (T, ...)
        if not self.is_transposed:
            up, down = up.mT, down.mT
        h = torch.relu(x.unsqueeze(1) @ up)
        return (h @ down).squeeze(1) * self.scale[expert].unsqueeze(-1)


class Model(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts(is_transposed)}) for _ in range(2))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["experts"](x, expert)
        return x


X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EXPERT = torch.tensor([0, 3, 1, 1, 0, 3, 3])


def made(is_transposed: bool) -> Model:
    torch.manual_seed(0)
    return Model(is_transposed).double().eval()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.LoRA(rank=12), dw.DoRA(rank=2), dw.Full()], ids=repr)
def test_every_expert_changes_by_factors_of_its_own(variant, is_transposed):
    model = made(is_transposed)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(X, EXPERT)
    dw.attach(model, variant, targets=["experts.up", "experts.down"])
    assert torch.equal(model(X, EXPERT), out)
    shaken(model)
    delta = model.layers[0]["experts"].deltas("default")["up"]
    if hasattr(delta, "A"):
        assert (delta.A.shape, delta.B.shape) == ((4, variant.rank, 6), (4, 10, variant.rank))
    adapted = model(X, EXPERT)
    adapted.square().sum().backward()
    if hasattr(delta, "A"):
        assert not delta.A.grad[2].any()  # expert 2 was not used
        assert delta.A.grad[3].any()
    dw.merge(model)
    torch.testing.assert_close(model(X, EXPERT), adapted, rtol=1e-11, atol=1e-11)
    dw.unmerge(model)
    dw.detach(model)
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())
    assert type(model.layers[0]["experts"]) is Experts


def test_one_expert_is_adapted_as_a_linear_layer_with_its_weight_would_be():
    model = made(False)
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=[r"layers\.1\.experts\.up"]))
    host = model.layers[1]["experts"]
    delta = host.deltas("default")["up"]
    for e in range(4):
        expected = host.up[e] + delta.variant.scale * delta.B[e] @ delta.A[e]
        torch.testing.assert_close(host.changed("up")[e], expected, rtol=1e-12, atol=1e-12)
    assert type(model.layers[0]["experts"]) is Experts


def test_a_target_that_names_the_module_says_how_to_name_its_parameters():
    with pytest.raises(TargetError, match=r"targets=\['layers\.0\.experts\.up'\]"):
        dw.attach(made(False), dw.LoRA(rank=2), targets=["experts"])


def test_a_vector_is_trained_in_full_or_not_at_all():
    model = made(False)
    with pytest.raises(TargetError, match=r"'layers\.0\.experts\.scale' \(4,\).*train="):
        dw.attach(model, dw.LoRA(rank=2), targets=["experts.scale"])
    dw.attach(model, dw.LoRA(rank=2), targets=["experts.up"], train=["experts.scale"])
    assert set(model.layers[0]["experts"].deltas("default")) == {"up", "scale"}
    again = made(False)
    dw.install(again, dw.get(shaken(model)))
    assert torch.equal(again(X, EXPERT), model(X, EXPERT))


def test_a_weight_that_a_layer_already_has_is_named_like_any_parameter():
    model = nn.ModuleDict({"rnn": nn.GRU(4, 5)})
    dw.attach(model, dw.LoRA(rank=2), targets=["rnn.weight_hh_l0"])
    assert list(model["rnn"].deltas("default")) == ["weight_hh_l0"]


def test_dropout_of_features_in_training():
    model = made(False)
    shaken(dw.attach(model, dw.LoRA(rank=2, dropout=0.5), targets=["experts.up"]), size=1.0).train()
    torch.manual_seed(0)
    assert not torch.equal(model(X, EXPERT), model(X, EXPERT))


def test_mixtrals_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).double().eval()
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        out = model(ids).logits
        dw.attach(model, dw.LoRA(rank=2), targets=["experts.gate_up_proj", "experts.down_proj"])
        assert torch.equal(model(ids).logits, out)
        shaken(model)
        adapted = model(ids).logits
        assert not torch.equal(adapted, out)
        dw.merge(model)
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", [dw.IA3(), dw.DoRA(rank=2)], ids=repr)
def test_a_stack_that_does_not_say_which_side_its_outputs_are_takes_lora_only(variant):
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = llama4.Llama4TextConfig(hidden_size=6, intermediate_size=10, num_local_experts=4)
    model = nn.ModuleDict({"experts": llama4.Llama4TextExperts(config)})
    kind = type(model["experts"])
    with pytest.raises(TargetError, match=r"Llama4TextExperts does not say .* set its is_transposed before"):
        dw.attach(model, variant, targets=["experts.gate_up_proj"])
    assert type(model["experts"]) is kind
    dw.detach(dw.attach(model, dw.LoRA(rank=2), targets=["experts.gate_up_proj"]))
    model["experts"].is_transposed = True
    dw.attach(model, variant, targets=["experts.gate_up_proj"])
    delta = model["experts"].deltas("default")["gate_up_proj"]
    assert (delta.l if isinstance(variant, dw.IA3) else delta.m).shape == (4, 20)
