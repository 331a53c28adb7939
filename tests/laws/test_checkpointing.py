"""Gradient checkpointing: what runs again in backward uses the adapters that were active in forward."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltaw as dw
from deltaw.core.roster import Frame
from deltaw.errors import ModelError

from .conftest import shaken


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.down(nn.functional.gelu(nn.functional.gelu(self.up(x)))))


class Blocks(nn.Module):
    """`reentrant`: None without checkpointing. `between` is called before every block."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.reentrant = reentrant
        self.choices: list | None = None

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            choice = self.choices[i] if self.choices else None
            if choice is not None:
                with dw.use(self, choice):
                    x = self.run(block, x)
            else:
                x = self.run(block, x)
        return x

    def run(self, block, x):
        return block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)


def model_and_input(reentrant: bool | None, variant=None) -> tuple[Blocks, torch.Tensor]:
    torch.manual_seed(0)
    model = Blocks(reentrant).double()
    for name in ("a", "b"):
        dw.attach(model, variant or dw.LoRA(rank=2), targets=["up", "down"], train=["norm"], name=name)
    return shaken(model), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expect(model: Blocks, loss) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients without checkpointing."""
    before, model.reentrant = model.reentrant, None
    value = loss(model)
    value.backward()
    model.reentrant = before
    return gradients(model), value.detach()


def check(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["outside", "inside another", "another thread", "another thread's other adapter"])
@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.LoRA(rank=2, dropout=0.5)], ids=repr)
def test_backward_away_from_the_context(reentrant, where, variant):
    model, x = model_and_input(reentrant, variant)

    def loss(model):
        torch.manual_seed(1)
        with dw.use(model, "a"):
            return model(x).square().sum()

    expected, _ = expect(model, loss)
    assert expected
    assert all(".a." in name for name in expected)
    dw.activate(model, "b")
    value = loss(model)
    if where == "inside another":
        with dw.use(model, ["b", "a"]):
            value.backward()
    elif where == "outside":
        value.backward()
    else:
        failures = []

        def run():
            try:
                with dw.use(model, "b" if "other" in where else None):
                    value.backward()
            except Exception as error:  # handed to the test's own thread
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not failures
    check(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_every_block_has_its_own_adapter(reentrant):
    model, x = model_and_input(reentrant)
    model.choices = ["b", "a", ["a", "b"]]

    def loss(model):
        return model(x).square().sum()

    expected, _ = expect(model, loss)
    with dw.disabled(model):
        value = loss(model)
    value.backward()
    check(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_use_inside_of_the_checkpointed_function_wins(reentrant):
    model, x = model_and_input(None)

    def inner(x):
        with dw.use(model, "b"):
            return model.blocks[0](x)

    expected = torch.autograd.grad(inner(x).square().sum(), x)
    with dw.use(model, "a"):
        y = checkpoint(inner, x, use_reentrant=reentrant)
    model.zero_grad()
    with dw.disabled(model):
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, *expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["one pass", "split"])
def test_rows(reentrant, how):
    model, x = model_and_input(reentrant)

    def loss(model):
        with dw.rows(model, ["a", None, "b", "a"], how=how):
            return model(x).square().sum()

    expected, _ = expect(model, loss)
    assert len(expected) == len([p for p in model.parameters() if p.requires_grad])
    loss(model).backward()
    check(gradients(model), expected)


def test_reentrant_with_threads_that_cannot_be_told_apart_is_refused():
    model, x = model_and_input(True)
    with dw.use(model, "a"):
        value = model(x).square().sum()
    roster = model.blocks[0].up.roster
    numbers, said = roster.journals[threading.get_ident()]
    roster.journals[-1] = (list(numbers), [(Frame((("b", 1.0),), 0, None),)] * len(said))
    with pytest.raises(ModelError, match="use_reentrant=False"):
        value.backward()


def test_two_losses_at_once():
    model, x = model_and_input(False)

    def losses(model):
        with dw.use(model, "a"):
            first = model(x).square().sum()
        with dw.use(model, "b"):
            second = model(2 * x).square().sum()
        return first + second

    expected, _ = expect(model, losses)
    losses(model).backward()
    check(gradients(model), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_transformers_model(reentrant):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    model = transformers.BertForSequenceClassification(config).double().train()
    for name in ("a", "b"):
        dw.attach(model, dw.LoRA(rank=2), train=["classifier"], name=name)
    shaken(model)
    ids = torch.randint(30, (2, 5))

    def loss(model):
        torch.manual_seed(2)
        with dw.use(model, "a"):
            return model(input_ids=ids, labels=torch.tensor([0, 1])).loss

    loss(model).backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "None of the inputs have requires_grad=True": adapters would learn nothing
        value = loss(model)
    value.backward()
    check(gradients(model), expected)


def under(choice, f):
    """`f` within `dw.use(model, choice)`."""

    def call(model, x):
        with dw.use(model, choice):
            return f(model, x)

    return call


def whole(model, x):
    return model(x)


def switched_at_the_end(model, x):
    y = model.blocks[0](x)
    with dw.use(model, "a"):
        return model.blocks[1](y)


def switched_at_the_start(model, x):
    with dw.use(model, "a"):
        y = model.blocks[0](x)
    return model.blocks[1](y)


def beside_the_base(model, x):
    with torch.no_grad(), dw.disabled(model):
        base = model(x)
    return model(x) - base


def before_the_base(model, x):
    y = model(x)
    with dw.disabled(model):
        return y - model(x)


def nested(model, x, reentrant=None):
    y = model.blocks[0](x)
    with dw.use(model, ["a", "b"]):
        y = model.blocks[1](y)
        inner = before_the_base if reentrant is None else lambda *a: checkpoint(before_the_base, *a, use_reentrant=True)
        y = inner(model, y)
    return model.blocks[2](y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("outside", [None, "a", {"a": 2.0, "b": -1.0}], ids=str)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize(
    "part", [whole, switched_at_the_end, switched_at_the_start, beside_the_base, before_the_base, nested]
)
def test_a_part_that_switches_itself_begins_as_it_began(part, reentrant, outside, elsewhere):
    model, x = model_and_input(None)  # "b" is active

    def run(checkpointed):
        def inner(model, x):
            if not checkpointed:
                return part(model, x)
            # of the torch that is tested, only reentrant parts may lie in reentrant ones
            nest = {"reentrant": True} if part is nested and reentrant else {}
            return checkpoint(lambda x: part(model, x, **nest), x, use_reentrant=reentrant)

        y = (inner if outside is None else under(outside, inner))(model, x)
        with dw.use(model, {"a": -3.0}) if elsewhere else nullcontext():
            y.square().sum().backward()
        return gradients(model)

    check(run(True), run(False))
