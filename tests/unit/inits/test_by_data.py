"""What the starts from data promise, each by the property that its paper derives it from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.registry import inits


class Net(nn.Module):
    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(12, 10, dtype=dtype)
        self.second = nn.Linear(10, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    mix = torch.randn(12, 12, dtype=torch.float64) * torch.logspace(0, -3, 12, dtype=torch.float64)[:, None]
    return [torch.randn(4, 5, 12, dtype=torch.float64) @ mix for _ in range(6)]


def attached(init: str, rank: int = 3, variant=dw.LoRA, **options) -> nn.Module:
    torch.manual_seed(0)
    return dw.attach(Net(), variant(rank=rank, init=init, **options), targets=["first", "second"])


def delta(model: nn.Module, name: str):
    return model.get_submodule(name).deltas("default")["weight"]


def test_eva_spans_the_directions_in_which_inputs_vary_most(batches):
    model = attached("eva")
    dw.initialize(model, batches)
    A = delta(model, "first").A.detach()
    rows = torch.cat([b.reshape(-1, 12) for b in batches])
    Vh = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=torch.float64))
    cosines = torch.linalg.svdvals(A @ Vh.T)
    assert float(cosines.min()) > 1 - 1e-4  # six held directions, three kept: what is cut is small
    assert not delta(model, "first").B.any()
    hidden = torch.cat([torch.tanh(model.first(b)).reshape(-1, 10) for b in batches])
    cosines = torch.linalg.svdvals(delta(model, "second").A @ torch.linalg.svd(hidden).Vh[:3].T)
    assert float(cosines.min()) > 1 - 1e-3


def test_eva_shares_ranks_out_at_the_same_scale(batches):
    model = attached("eva", rank=4, alpha=6)
    before = sum(delta(model, n).variant.rank for n in ("first", "second"))
    dw.initialize(model, [b * torch.tensor([1.0] + [1e-3] * 11) for b in batches], spread=2)
    ranks = [delta(model, n).variant.rank for n in ("first", "second")]
    assert sum(ranks) == before
    assert ranks[0] < 4 < ranks[1], "the inputs of the first layer vary in one direction only"
    for name, rank in zip(("first", "second"), ranks):
        assert delta(model, name).A.shape[0] == delta(model, name).B.shape[1] == rank
        assert delta(model, name).A.requires_grad
        assert delta(model, name).variant.scale == 1.5
    x = batches[0]
    torch.testing.assert_close(dw.install(plain(), dw.get(model))(x), model(x))


def plain() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("init", ["corda", "corda-kpm"])
def test_corda_splits_what_the_data_show(batches, init):
    model = attached(init, alpha=4.5)
    dw.initialize(model, batches)
    rows = torch.cat([b.reshape(-1, 12) for b in batches])
    moment = rows.T @ rows / len(rows)
    moment += 0.01 * moment.diagonal().mean() * torch.eye(12)
    weight = model.first.weight.detach()
    values = torch.linalg.svdvals(weight @ moment)
    taken = torch.linalg.svdvals(1.5 * delta(model, "first").B @ delta(model, "first").A @ moment)[:3]
    torch.testing.assert_close(taken.detach(), values[:3] if init == "corda" else values[-3:], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model(batches[0]), plain()(batches[0]))


def test_lora_ga_moves_first_as_the_best_low_rank_gradient(batches):
    model = attached("lora-ga", rank=2, alpha=3)
    dw.initialize(model, batches, loss=square)
    reference = plain()
    sum(square(reference, b) for b in batches).backward()
    U, S, Vh = torch.linalg.svd(reference.first.weight.grad)
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    d = delta(model, "first")
    step = d.B @ d.B.T @ reference.first.weight.grad + reference.first.weight.grad @ d.A.T @ d.A
    torch.testing.assert_close(step.detach(), 10**0.5 / 16 * best, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model(batches[0]), plain()(batches[0]))
    assert model.first.weight.grad is None
    assert not model.first.weight.requires_grad
    torch.testing.assert_close(dw.install(plain(), dw.get(model))(batches[0]), model(batches[0]))


@pytest.mark.parametrize("variant", [dw.LoRA, dw.DoRA])
def test_loftq_makes_up_for_what_quantising_lost(batches, variant):
    exact = plain()
    coarse = copy.deepcopy(exact)
    with torch.no_grad():
        for p in coarse.parameters():
            p.copy_((p * 8).round() / 8)
    lost = exact.first.weight - coarse.first.weight
    model = dw.attach(coarse, variant(rank=3, init="loftq"), targets=["first", "second"])
    dw.initialize(model, originals=exact)
    values = torch.linalg.svdvals(lost.detach())
    if variant is dw.LoRA:
        left = exact.first.weight - model.first.changed("weight")
        torch.testing.assert_close(left.norm().detach(), values[3:].norm())
    assert (model(batches[0]) - exact(batches[0])).norm() < (plain_coarse(exact)(batches[0]) - exact(batches[0])).norm()


def plain_coarse(exact: nn.Module) -> nn.Module:
    coarse = copy.deepcopy(exact)
    with torch.no_grad():
        for p in coarse.parameters():
            p.copy_((p * 8).round() / 8)
    return coarse


def test_incremental_svd_is_that_of_everything_where_the_rank_suffices():
    torch.manual_seed(0)
    rows = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 20, dtype=torch.float64)
    observer = inits["eva"].observer(2)
    for part in rows.split([1, 30, 3, 16]):
        observer.see(part)
    S = torch.linalg.svdvals(observer.result())
    torch.testing.assert_close(S, torch.linalg.svdvals(rows)[:4] / rows.norm(), rtol=1e-10, atol=0)


def test_training_without_initialize_is_refused_and_eval_is_not(batches):
    model = attached("eva")
    model.eval()
    torch.testing.assert_close(model(batches[0]), plain()(batches[0]), rtol=0, atol=0)
    model.train()
    with pytest.raises(dw.errors.ModelError, match=r"dw.initialize\(model, batches\)"):
        model(batches[0])
    dw.initialize(model, batches)
    model(batches[0]).sum().backward()
    with pytest.raises(dw.errors.ModelError, match="nothing to initialize"):
        dw.initialize(model, batches)


def test_modes_flags_and_gradients_are_put_back(batches):
    model = attached("lora-ga", rank=2)
    model.train()
    model.second.eval()
    model.first.bias.requires_grad_(True)
    model.first.bias.grad = torch.ones(10, dtype=torch.float64)
    dw.initialize(model, [{"x": b} for b in batches], loss=lambda m, b: m(**b).sum())
    assert model.training
    assert not model.second.training
    assert torch.equal(model.first.bias.grad, torch.ones(10))
    assert all(not p._post_accumulate_grad_hooks for p in [model.first.weight])


def test_errors_name_what_is_missing(batches):
    with pytest.raises(dw.errors.ConfigError, match="needs at least one batch"):
        dw.initialize(attached("eva"))
    with pytest.raises(dw.errors.ConfigError, match=r"returns no `.loss`"):
        dw.initialize(attached("lora-ga", rank=2), batches)
    with pytest.raises(dw.errors.ConfigError, match="originals=unquantised_model"):
        dw.initialize(attached("loftq"))
    with pytest.raises(dw.errors.UnknownName, match=r"'first.weight'"):
        dw.initialize(attached("loftq"), originals={"frst.weight": torch.zeros(1)})
    with pytest.raises(dw.errors.ConfigError, match=r"spread=0\.5"):
        dw.initialize(attached("eva"), batches, spread=0.5)
    unused = attached("eva")
    unused.forward = lambda x: unused.first(x)
    with pytest.raises(dw.errors.ModelError, match=r"'second.weight' \(1 weights\) were not used"):
        dw.initialize(unused, batches)


def test_a_refused_rank_leaves_every_adapter_as_it_was(batches):
    model = attached("lora-ga", rank=5)  # first: 10 of 10 directions; second: 10 of 8
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(dw.errors.ConfigError, match=r"rank=5 is too large for a weight \(8, 10\), at most 4"):
        dw.initialize(model, batches, loss=square)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.train()
    with pytest.raises(dw.errors.ModelError):
        model(batches[0])


def test_inputs_of_layers_that_are_not_linear_are_refused_by_name():
    model = dw.attach(nn.Sequential(nn.Conv1d(4, 6, 3)), dw.LoRA(rank=2, init="eva"), targets=["0"])
    with pytest.raises(dw.errors.TargetError, match=r"'0.weight': init='eva' .* this is a Conv1d"):
        dw.initialize(model, [torch.randn(2, 4, 9)])


def test_gradients_of_any_layer_will_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten())
    x = torch.randn(2, 4, 9)
    before = model(x)
    dw.attach(model, dw.LoRA(rank=2, init="lora-ga"), targets=["0"])
    dw.initialize(model, [x], loss=square)
    assert model[0].deltas("default")["weight"].B.any()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("init", ["eva", "corda", "lora-ga"])
def test_a_language_model_with_its_own_loss(init):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 30, (2, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    before = model(**batch).logits
    dw.attach(model, dw.LoRA(rank=2, init=init), targets=["c_attn", "c_proj"])
    dw.initialize(model, [batch, batch])
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    model.train()
    model(**batch).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None for g in grads)
