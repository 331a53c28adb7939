"""The frozen prefix computed once: the same training as computing it every time, and only what is read is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaw as dw
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.prefix import NotConstant, Prefix, flat
from deltaw.training.prefix_file import PrefixFile
from deltaw.training.prefix_search import search
from deltaw.training.run import train
from tests.tiny_text import make_data, make_model


@pytest.mark.parametrize(
    ("method", "targets"), [("head", "all-linear"), ("lora", "layer.1.attention.self.query"), ("dora", "classifier")]
)
def test_a_run_is_the_same_with_and_without(tmp_path, capsys, method, targets):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.csv", 60)
    if targets == "classifier":  # of the base's own: a new one would have to be trained in full
        from transformers import AutoModelForSequenceClassification

        whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
        whole.save_pretrained(tmp_path / "model")
    kept = []
    for cached in (True, False):
        config = build(
            {
                "recipe": "text-classification",
                "method": method,
                "model": str(tmp_path / "model"),
                "data": str(tmp_path / "data.csv"),
                "targets": targets,
                "lora": {"rank": 2, "dropout": 0.1},
                "train": [] if targets == "classifier" else None,
                "epochs": 2,
                "cache_prefix": cached,
                "base_dropout": 0.0,
            }
        )
        results = train(lambda c=config: recipes["text-classification"].task(c), config, tmp_path / str(cached))
        kept.append((results["test"]["loss"], load_file(tmp_path / str(cached) / "adapter_model.safetensors")))
    assert capsys.readouterr().out.count("frozen and was computed once") == 1
    (one_loss, one), (other_loss, other) = kept
    assert one_loss == pytest.approx(other_loss, rel=1e-5)
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)


class Examples:
    """As much of a task as the search asks for: `items` (features, length) and a batch that pads them."""

    augments = False

    def __init__(self, items: Sequence[Tensor], lengths: Sequence[int] | None = None) -> None:
        self.splits = {"train": items}
        self.lengths = lengths

    def widths(self, split: str) -> Sequence[int] | None:
        return self.lengths

    def example(self, split: str, index: int, random: object) -> Tensor:
        return self.splits[split][index]

    def collate(self, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"x": nn.utils.rnn.pad_sequence(list(examples), batch_first=True)}


def found(model: nn.Module, task: Examples, tmp_path) -> Prefix:
    def answer(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = model(batch["x"])
        return out.sum(), out

    return search(model, task, answer, model.train, PrefixFile(tmp_path))  # type: ignore[arg-type]


def uses(prefix: Prefix) -> dict[str, list[str]]:
    return {cut.name: [leaf.use for leaf in cut.leaves] for cut in prefix.cuts}


def frozen(model: nn.Module, targets: str) -> nn.Module:
    return dw.attach(model, dw.LoRA(rank=2), targets=targets)


class Body(nn.Module):
    """Returns more than any head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        states = self.layer(x)
        return {"states": states, "unread": states * 2, "pooled": states.mean(1)}


class Read(nn.Module):
    """A body and a head that reads some of it."""

    def __init__(self, read: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.body, self.read, self.head = Body(), read, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.body(x)))


@pytest.mark.parametrize(
    ("read", "kept"),
    [
        (lambda o: o["pooled"], ["none", "none", "all"]),
        (lambda o: o["states"][:, 0], ["first", "none", "none"]),
        (lambda o: o["states"].sum(1), ["all", "none", "none"]),
    ],
)
def test_only_what_is_read_is_kept_and_played_back(read, kept, tmp_path):
    torch.manual_seed(0)
    model = frozen(Read(read), "head")
    x = torch.randn(3, 5, 4)
    prefix = found(model, Examples(list(x)), tmp_path)
    assert uses(prefix) == {"body": kept}
    rows = prefix.record({"x": x}, None)
    expected, calls = model(x), model.body.calls
    with prefix.playing([rows[2], rows[0]]):
        assert torch.equal(model(x[[2, 0]]), expected[[2, 0]])
    assert model.body.calls == calls, "the body did not run"
    assert torch.equal(model(x), expected), "and runs again afterwards"


def test_of_a_stack_the_last_output_below_the_adapter_is_kept(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(1),
        nn.Linear(24, 3),
    )
    prefix = found(frozen(model, "3"), Examples(list(torch.randn(6, 1, 8, 8))), tmp_path)
    assert uses(prefix) == {"0": ["none"], "1": ["none"], "2": ["all"]}
    assert prefix.row_bytes(0) == 4 * 4 * 4 * 4


class Residual(nn.Module):
    """A stem with channels folded into the batch, then a block whose norm comes first, as in Whisper."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.LayerNorm(4)
        self.places = nn.Embedding(9, 4)
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = nn.functional.gelu(self.stem(x.flatten(0, 1))).transpose(1, 2) + self.places.weight[: x.shape[-1]]
        states = states + self.query(self.norm(states))
        return self.out(states).unflatten(0, (len(x), 3)).mean((1, 2))


def test_folded_channels_are_kept_per_example_and_a_norm_is_computed_live(tmp_path):
    torch.manual_seed(0)
    prefix = found(frozen(Residual(), "query"), Examples(list(torch.randn(5, 3, 2, 9))), tmp_path)
    assert uses(prefix) == {"stem": ["all"]}
    assert prefix.cuts[0].leaves[0].fold == 3


class Masked(nn.Module):
    """Positions that are padded with zeros do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x)) * (x != 0).any(-1, keepdim=True)).sum(1)


def test_short_examples_take_no_more_room_than_they_need(tmp_path):
    torch.manual_seed(0)
    model = frozen(Masked(), "head")
    prefix = found(model, Examples([torch.randn(n, 4) for n in (2, 5, 3)], [2, 5, 3]), tmp_path)
    assert [prefix.row_bytes(n) for n in (2, 5)] == [2 * 6 * 4, 5 * 6 * 4]
    rows = prefix.record({"x": torch.randn(2, 5, 4)}, [5, 3])
    assert [t.shape for t in prefix.read([rows[1]])["body"]] == [(1, 3, 6)]
    assert [t.shape for t in prefix.read(rows)["body"]] == [(2, 5, 6)]
    with pytest.raises(NotConstant, match="differs between batches"):
        prefix.record({"x": torch.randn(2, 4, 4)}, [5, 3])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.body(x)))


class Unmasked(nn.Module):
    """Examples of one batch see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("model", "targets", "why"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), "0", "below the first trained layer, 0"),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 2)), "1", None),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2)), "2", "0 acts differently in training"),
        (Twice(), "head", "one entry per example"),
        (nn.Sequential(nn.Linear(4, 4), Unmasked(), nn.Linear(4, 2)), "2", "does not give the same answers"),
    ],
)
def test_what_cannot_be_cut_is_said(model, targets, why, tmp_path):
    torch.manual_seed(0)
    task = Examples(list(torch.randn(5, 4)))
    if why is None:  # the layer before the dropout is still a constant
        assert uses(found(frozen(model, targets), task, tmp_path)) == {"0.0": ["all"]}
        return
    with pytest.raises(NotConstant, match=why):
        found(frozen(model, targets), task, tmp_path)


def test_outputs_are_taken_apart_and_put_together():
    a, b = torch.ones(2), torch.zeros(3)
    tree = flat({"a": (a, None), "b": [b]})
    assert tree is not None
    assert tree.rebuild([b, a]) == {"a": (b, None), "b": [a]}
    assert flat({"a": object()}) is None


def test_a_file_that_would_not_fit_is_refused_and_nothing_is_left(tmp_path):
    file = PrefixFile(tmp_path)
    with pytest.raises(OSError, match="more than 8"):
        file.reserve(9 << 30)
    at = [file.write([torch.arange(3), torch.ones(2, dtype=torch.bfloat16)]) for _ in range(2)]
    assert at == [0, 28]
    numbers, ones = file.read(28, [((3,), torch.int64), ((1, 2), torch.bfloat16)])
    assert numbers.tolist() == [0, 1, 2]
    assert ones.tolist() == [[1.0, 1.0]]
    assert not list(tmp_path.iterdir())
    file.close()
