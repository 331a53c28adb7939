"""Law 6, isolation: in a mixed batch each row equals the same row run alone with its adapter, and touches no other."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltaw as dw
from deltaw.core.registry import variants
from deltaw.errors import ConfigError, ModelError
from deltaw.model import probe

from .conftest import shaken

VARIANTS = [v for _, cls in variants.items() for v in cls.examples()]


class Classifier(nn.Module):
    """Rows through linear layers, a norm and a head; gives a mapping."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor, bias: torch.Tensor | None = None) -> dict[str, object]:
        x = self.embed(ids)
        x = self.drop(torch.relu(self.first(x))) + x
        x = self.second(self.norm(x))
        if bias is not None:
            x = x + bias
        return {"logits": self.head(x.mean(1)), "hidden": (x, [x.sum(-1)]), "kind": "test"}


def with_adapters(model: nn.Module, names: list[str], variant=None, **options) -> nn.Module:
    for i, name in enumerate(names):
        dw.attach(model, variant or dw.LoRA(rank=2 + i % 3), name=name, **options)
        shaken(model, seed=i)
    return model


def alone(model: nn.Module, x: torch.Tensor, choices: list) -> torch.Tensor:
    rows = []
    for row, choice in zip(x, choices):
        with dw.use(model, choice):
            rows.append(model(row[None])["logits"])
    return torch.cat(rows)


@pytest.mark.parametrize("how", ["auto", "one pass", "split"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_every_variant_and_a_copied_head_and_norm(variant, training, how):
    torch.manual_seed(0)
    model = Classifier()
    model.drop.p = 0.0
    options = {"targets": ["first", "second"], "train": ["head", "norm"]}
    if variant.any_shape:
        options = {"targets": ["first", "second", "head", "norm"]}
    with_adapters(model, ["a", "b"], variant, **options).double().train(training)
    if getattr(variant, "dropout", 0) or getattr(variant, "rank_dropout", 0) or getattr(variant, "module_dropout", 0):
        model.eval()
    ids = torch.randint(20, (5, 7))
    choices = ["b", None, "a", {"a": 0.5, "b": -2.0}, "b"]
    expected = alone(model, ids, choices)
    with dw.rows(model, choices, how=how) as report:
        found = model(ids)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-9, atol=1e-9)
    assert report.strategy == ("one pass" if how == "auto" else how)
    assert found["kind"] == "test"
    assert found["hidden"][1][0].shape == (5, 7)


@pytest.mark.parametrize("how", ["one pass", "split"])
def test_gradients_are_those_of_the_rows_alone(how):
    model = with_adapters(Classifier().double(), ["a", "b"], targets=["first", "second"], train=["head"]).eval()
    ids, choices = torch.randint(20, (4, 6)), ["a", "b", None, "a"]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(alone(model, ids, choices).square().sum(), trained)
    with dw.rows(model, choices, how=how):
        loss = model(ids)["logits"].square().sum()
    found = torch.autograd.grad(loss, trained)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batches", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_mixed_batches_and_a_canary(batches):
    """R5: batches over up to 64 adapters differ by at most 1e-6; an adapter of NaN touches no other row."""
    rng = random.Random(0)
    torch.manual_seed(0)
    model = Classifier(16).eval()
    names = [f"a{i}" for i in range(64)]
    for i, name in enumerate(names):
        dw.attach(model, [dw.LoRA(rank=1 + i % 4), dw.DoRA(rank=2)][i % 2], targets=["first", "second"], name=name)
    dw.attach(model, dw.LoRA(rank=2), targets=["first"], name="canary")
    shaken(model, size=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "canary" in name:
                parameter.fill_(float("nan"))
    with torch.no_grad():
        for batch in range(batches):
            choices = [rng.choice([None, rng.choice(names), rng.choice(names[:3])]) for _ in range(rng.randint(2, 12))]
            ids = torch.randint(20, (len(choices), rng.randint(1, 9)))
            expected = alone(model, ids, choices)
            with dw.rows(model, choices, how=["auto", "one pass", "split"][batch % 3]):
                found = model(ids)["logits"]
            assert float((found - expected).abs().max()) <= 1e-6
            place = rng.randrange(len(choices))
            choices[place] = "canary"
            with dw.rows(model, choices, how=["auto", "one pass", "split"][batch % 3]):
                poisoned = model(ids)["logits"]
            others = [i for i in range(len(choices)) if i != place]
            assert bool(poisoned[place].isnan().all())
            assert float((poisoned[others] - expected[others]).abs().max()) <= 1e-6


# ---- layers whose first dimension is not the rows


class RelativePositions(nn.Module):
    """As DeBERTa: one projection sees the rows and, in another call, a table that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        scores = self.q(x) @ self.q(self.table).T
        return torch.softmax(scores, -1) @ self.v(self.table) + self.v(x)


class TimeFirst(nn.Module):
    """Batch first outside, time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.encoder(x.transpose(0, 1))).transpose(0, 1)


class Detectors(nn.Module):
    """(rows, detectors, features): the detectors are folded into the batch and out again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        rows, detectors, features = x.shape
        y = torch.tanh(self.inner(x.reshape(rows * detectors, features)))
        return self.head(y.reshape(rows, detectors, features).mean(1))


class Reversed(nn.Module):
    """As many entries as rows, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x.flip(0)).flip(0)


FOREIGN = [
    (RelativePositions, (4, 7, 8), ["q", "v"], "the same for all rows"),
    (TimeFirst, (4, 7, 8), ["linear1", "out"], "first dimension 7"),
    (TimeFirst, (3, 3, 8), ["linear1", "out"], "first dimension"),
    (Detectors, (4, 3, 6), ["inner", "head"], "3 entries for each row"),
    (Reversed, (4, 6), ["inner"], "not the rows in their order"),
]


@pytest.mark.parametrize(("kind", "shape", "targets", "reason"), FOREIGN)
@pytest.mark.parametrize("training", [False, True])
def test_foreign_layers_are_named_and_the_call_is_split(kind, shape, targets, reason, training):
    torch.manual_seed(0)
    model = with_adapters(kind().double(), ["a", "b"], targets=targets).train(training)
    x = torch.randn(*shape, dtype=torch.float64)
    choices = ["a", None, "b", "a"][: shape[0]]
    rows = []
    for row, choice in zip(x, choices):
        with dw.use(model, choice):
            rows.append(model(row[None]))
    with dw.rows(model, choices) as report, pytest.warns(UserWarning, match=r"once for each of its \d adapter groups"):
        found = model(x)
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-9, atol=1e-9)
    assert report.strategy == "split"
    assert any(reason in why for why in report.named.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dw.rows(model, choices):
            model(x)


def test_a_declared_multiple_runs_in_one_pass():
    model = with_adapters(Detectors().double(), ["a", "b"], targets=["inner", "head"])
    x, choices = torch.randn(4, 3, 6, dtype=torch.float64), ["a", None, "b", "a"]
    with dw.rows(model, choices, how="split"):
        expected = model(x)
    with dw.rows(model, choices, multiples={"inner": 3}) as report:
        found = model(x)
    assert report.strategy == "one pass"
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with dw.rows(model, choices, multiples={"inner": 2}) as report, pytest.warns(UserWarning, match="3 entries"):
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert report.strategy == "split"
    with pytest.raises(ModelError, match="declare its multiple"), dw.rows(model, choices, how="one pass"):
        model(x)


def test_a_time_first_model():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2, enable_nested_tensor=False)
    model = with_adapters(encoder.double().train(), ["a", "b"], targets=["linear1", "linear2"])
    choices = ["a", None, "b"]
    for length in (5, 3):
        x = torch.randn(length, 3, 8, dtype=torch.float64)
        rows = []
        for i, choice in enumerate(choices):
            with dw.use(model, choice):
                rows.append(model(x[:, i : i + 1]))
        with dw.rows(model, choices, how="split"):
            torch.testing.assert_close(model(x), torch.cat(rows, 1), rtol=1e-9, atol=1e-9)


class Nested(nn.Module):
    """A module with a parameter of its own around layers that are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))
        self.inner = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.encoder(self.inner(x) + self.shift)
        return self.attention(x, x, x)[0] + x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Nested(), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x)).mean(1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["auto", "one pass", "split"])
def test_hosts_inside_of_hosts(how, training):
    torch.manual_seed(0)
    model = Around().double()
    dw.attach(model, dw.LoRA(rank=2), targets=["inner", "linear1"], train=["shift"], name="a")
    dw.attach(model, dw.LoRA(rank=2), targets=["inner", "linear2", "attention"], name="b")
    dw.attach(model, dw.LoRA(rank=2), targets=["head"], train=["shift"], name="c")
    shaken(model).train(training)
    x, choices = torch.randn(5, 3, 8, dtype=torch.float64), ["a", "b", None, "c", "b"]
    rows = []
    for row, choice in zip(x, choices):
        with dw.use(model, choice):
            rows.append(model(row[None]))
    with dw.rows(model, choices, how=how) as report:
        found = model(x)
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-9, atol=1e-9)
    assert report.strategy == ("one pass" if how == "auto" else how)


# ---- what cannot be is refused


class Loss(Classifier):
    def forward(self, ids, labels):
        out = super().forward(ids)
        return nn.functional.cross_entropy(out["logits"], labels), out["logits"]


def test_a_loss_of_the_whole_batch():
    model = with_adapters(Loss().double().eval(), ["a", "b"], targets=["first"])
    ids, labels, choices = torch.randint(20, (3, 5)), torch.tensor([0, 1, 2]), ["a", "a", "b"]
    with dw.rows(model, choices, how="one pass"):
        expected, _ = model(ids, labels)
    with dw.rows(model, choices, how="split", scalars="mean"):
        found, _ = model(ids, labels=labels)
    torch.testing.assert_close(found, expected)
    with (
        pytest.raises(ModelError, match=r"output '0'.*speaks for the whole batch"),
        dw.rows(model, choices, how="split"),
    ):
        model(ids, labels)


def test_refusals():
    model = with_adapters(Classifier(), ["a", "b"], targets=["first"])
    ids = torch.randint(20, (3, 5))
    with pytest.raises(LookupError, match="no adapter 'c'"), dw.rows(model, ["a", "c"]):
        pass
    with pytest.raises(ConfigError, match="give a list"), dw.rows(model, "a"):
        pass
    with pytest.raises(ModelError, match="names 2 rows"), dw.rows(model, ["a", "b"]):
        model(ids)
    with pytest.raises(ModelError, match=r"first was called inside of dw\.rows"), dw.rows(model, ["a", "b", None]):
        model.first(torch.randn(3, 12))
    with pytest.raises(ModelError, match="dimension 1 is declared"), dw.rows(model, ["a", "b", None], dims={"ids": 1}):
        model(ids)
    with pytest.raises(ModelError, match="cannot be taken apart"), dw.rows(model, ["a", "b", None]):
        model(ids, bias=object())
    with pytest.raises(ModelError, match="leave the context first"), dw.rows(model, ["a"]):
        copy.deepcopy(model)
    assert "forward" not in model.__dict__


def test_nesting_restores_and_a_shared_argument_is_shared():
    model = with_adapters(Classifier().double().eval(), ["a", "b"], targets=["first"])
    ids, choices = torch.randint(20, (3, 5)), ["a", None, "b"]
    shift = torch.randn(5, 12, dtype=torch.float64)
    with dw.use(model, "a"):
        only_a = model(ids)["logits"]
    with dw.rows(model, choices):
        mixed = model(ids)["logits"]
        with dw.use(model, "a"):
            torch.testing.assert_close(model(ids)["logits"], only_a)
        with dw.rows(model, ["a"] * 3) as inner:
            torch.testing.assert_close(model(ids)["logits"], only_a)
        assert inner.strategy == "one adapter"
        torch.testing.assert_close(model(ids)["logits"], mixed)
        one = model(ids, bias=shift)["logits"]
        with pytest.raises(IndexError):
            model(ids + 100)
        torch.testing.assert_close(model(ids)["logits"], mixed)
    assert "forward" not in model.__dict__
    with dw.rows(model, choices, how="split"):
        torch.testing.assert_close(model(ids, shift)["logits"], one)


def test_the_probe_leaves_no_trace():
    model = with_adapters(Classifier(), ["a", "b"], targets=["first"]).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with dw.rows(model, ["a", "b"]) as request:
        request.probed(request.root.forward.__wrapped__, (torch.randint(20, (2, 5)),), {}, {"0.0": 0})
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


def test_no_dropout_within_the_probe():
    x = torch.ones(50)
    with probe.NoDropout():
        assert torch.equal(nn.functional.dropout(x, 0.5), x)
        assert torch.equal(nn.Dropout(0.5)(x), x)
    assert not torch.equal(nn.Dropout(0.5)(x), x)


# ---- transformers


def deberta(**options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        max_relative_positions=-1,
        max_position_embeddings=32,
        num_labels=3,
        **options,
    )
    torch.manual_seed(0)
    return transformers.DebertaV2ForSequenceClassification(config)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("training", [False, True])
def test_deberta_shares_its_projections_with_the_relative_embeddings(training):
    model = deberta(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pooler_dropout=0.0).double()
    targets = ["query_proj", "value_proj"]
    with_adapters(model, ["a", "b"], targets=targets, train=["classifier"]).train(training)
    ids, choices = torch.randint(50, (4, 9)), ["a", None, "b", "a"]
    mask = torch.ones(4, 9, dtype=torch.long)
    rows = []
    for i, choice in enumerate(choices):
        with dw.use(model, choice):
            rows.append(model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
    with dw.rows(model, choices) as report, pytest.warns(UserWarning, match="query_proj.* the same for all rows"):
        found = model(input_ids=ids, attention_mask=mask)
    assert report.strategy == "split"
    assert all("query_proj" in path for path in report.named)
    assert type(found).__name__ == "SequenceClassifierOutput"
    torch.testing.assert_close(found.logits, torch.cat(rows), rtol=1e-9, atol=1e-9)
    with dw.rows(model, choices, how="split"), pytest.raises(ModelError, match="'loss'"):
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0]))
    found.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_generation_in_one_pass():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    with_adapters(model, ["a", "b"], targets=["q_proj", "v_proj", "down_proj"])
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    ids, choices = torch.randint(1, 40, (3, 5)), ["a", None, "b"]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    rows = []
    for i, choice in enumerate(choices):
        with dw.use(model, choice):
            rows.append(model.generate(ids[i : i + 1], **{**options, "attention_mask": torch.ones(1, 5).long()}))
    with dw.rows(model, choices, how="one pass"):
        found = model.generate(ids, **options)
    assert torch.equal(found, torch.cat(rows))
    assert len({tuple(r.flatten().tolist()[5:]) for r in rows}) == 3
    with dw.rows(model, choices) as report:
        scores = model(ids, use_cache=False).logits
    assert report.strategy == "one pass"
    assert scores.shape == (3, 5, 40)


def test_a_cache_that_an_adapted_layer_is_given_is_refused():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config).eval()
    with_adapters(model, ["a", "b"], targets=["in_proj", "x_proj"])
    ids, rows = torch.randint(1, 40, (2, 5)), []
    for row, choice in zip(ids, ["a", "b"]):
        with dw.use(model, choice):
            rows.append(model(row[None]).logits)
    with (
        dw.rows(model, ["a", "b"], how="one pass"),
        pytest.raises(ModelError, match=r"given a .*Cache.*use_cache=False"),
    ):
        model(ids)
    with dw.rows(model, ["a", "b"], how="one pass"):
        torch.testing.assert_close(model(ids, use_cache=False).logits, torch.cat(rows))


def test_a_cache_that_a_split_model_gives_is_refused_with_the_cure():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with_adapters(model, ["a", "b"], targets=["c_attn"])
    ids = torch.randint(1, 40, (2, 5))
    with dw.rows(model, ["a", "b"], how="split"):
        with pytest.raises(ModelError, match=r"'past_key_values', a DynamicCache.*use_cache=False.*how='one pass'"):
            model(ids)
        model(ids, use_cache=False)


class Fickle(nn.Module):
    """A checkpointed part that calls its second layer otherwise where gradients are wanted, as in the probe they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def part(self, x):
        y = self.first(x)
        return self.second(y[None])[0] if torch.is_grad_enabled() else self.second(y)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=True)


def test_a_checkpointed_part_that_can_no_longer_be_split_says_so():
    model = Fickle()
    with_adapters(model, ["a", "b"], targets=["first", "second"])
    x = torch.randn(2, 8, requires_grad=True)
    with dw.rows(model, ["a", "b"]):
        output = model(x)
    with pytest.raises(ModelError, match=r"second was called with \(1, 2, 8\).*gradient checkpointing.*how='split'"):
        output.sum().backward()
    with dw.rows(model, ["a", "b"], how="split"):
        output = model(x)
    output.sum().backward()


def test_rows_around_a_checkpoint_say_where_they_belong():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with_adapters(model, ["a", "b"], targets=["0", "1"])
    x = torch.randn(2, 8, requires_grad=True)
    with dw.rows(model, ["a", "b"]):
        output = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(ModelError, match="enter it inside of the checkpointed function"):
        output.sum().backward()
    with dw.rows(model, ["a", "b"]):
        checkpoint(model, x, use_reentrant=False).sum().backward()


# ---- sorted at the entry


class Seen(Classifier):
    """Keeps what its first layer was given."""

    def forward(self, ids, bias=None):
        self.seen = ids
        return super().forward(ids, bias)


@pytest.mark.parametrize("training", [False, True])
def test_rows_are_sorted_once_at_the_entry_and_every_output_is_put_back(training):
    model = with_adapters(Seen().double(), ["a", "b"], targets=["first", "second"]).train(training)
    model.drop.p = 0.0
    ids, choices = torch.randint(20, (5, 6)), ["b", "a", None, "a", "b"]
    with dw.rows(model, choices) as report:
        found = model(ids)
    assert report.strategy == "one pass"
    assert torch.equal(model.seen, ids[[2, 0, 4, 1, 3]]), "the shortest group first, then as they come"
    with dw.rows(model, choices, how="split"):
        expected = model(ids)
    assert found.pop("kind") == expected.pop("kind")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Upside(Classifier):
    """An output that has the rows in another order than the inputs."""

    def forward(self, ids, bias=None):
        out = super().forward(ids, bias)
        return {"logits": out["logits"], "last first": out["logits"].flip(0)}


def test_a_model_whose_outputs_are_not_in_the_rows_order_is_not_sorted():
    model = with_adapters(Upside().double().eval(), ["a", "b"], targets=["first", "second"])
    ids, choices = torch.randint(20, (4, 6)), ["a", "b", None, "a"]
    expected = alone(model, ids, choices)
    with dw.rows(model, choices) as report:
        found = model(ids)
    assert report.strategy == "one pass"
    torch.testing.assert_close(found["logits"], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["last first"], expected.flip(0), rtol=1e-9, atol=1e-9)


class Gated(nn.Module):
    """`gate` is one number for each channel, the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1) * gate.softmax(0).max()


class Biased(nn.Module):
    """Attention with a bias (T, T), the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return (y @ x.mT + bias).softmax(-1) @ y


class Rated(Gated):
    """`gate` is one number for each row."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * gate[:, None, None]


@pytest.mark.filterwarnings("ignore:dw.rows. layer")
@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize("how", ["auto", "split"])
@pytest.mark.parametrize("build", [Gated, Biased, Rated, nn.TransformerEncoderLayer])
def test_an_argument_of_the_batchs_size_by_chance_stays_whole(build, how, count):
    torch.manual_seed(0)
    model = build(16, 2, 32, batch_first=True) if build is nn.TransformerEncoderLayer else build()
    with_adapters(model, ["a", "b"], targets=[nn.Linear]).double().eval()
    choices = ["a", None, "b", "a", "b", "a"][:count]
    x = torch.randn(count, count, 16, dtype=torch.float64)
    other = torch.randn(*(count, count) if build is Biased else (count,)).double()
    if build is nn.TransformerEncoderLayer:
        other = torch.ones(count, count, dtype=torch.bool).triu(1)
    expected = []
    for i, choice in enumerate(choices):
        with dw.use(model, choice):
            expected.append(model(x[i : i + 1], other[i : i + 1] if build is Rated else other))
    with dw.rows(model, choices, how=how):
        torch.testing.assert_close(model(x, other), torch.cat(expected))


def test_what_rows_cannot_be_told_is_said_with_the_cure():
    class Mixing(Gated):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return self.layer(x) - x.mean(0) * gate.sum()

    model = with_adapters(Mixing(), ["a", "b"], targets=["layer"])
    x, gate = torch.randn(4, 3, 16), torch.randn(4)
    with dw.rows(model, ["a", "b", "a", "b"], how="split"), pytest.warns(UserWarning, match="'gate': None"):
        model(x, gate)
    with dw.rows(model, ["a", "b", "a", "b"], how="split", dims={"x": 0, "gate": None}), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, gate)
