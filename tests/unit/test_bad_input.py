"""Every mistake gets one message that says what, where and how to mend, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ConfigError, DeltawError, ModelError, NameTaken, NonFinite, TargetError, UnknownName


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.k_proj = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.q_proj(x) + self.k_proj(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = nn.Module()
    built.blocks = nn.Sequential(Block(), Block())
    built.head = nn.Linear(6, 2)
    built.subhead = nn.Linear(6, 2)
    built.forward = lambda x: built.head(built.blocks(x))
    return built


def picture(model):
    """All that an attach could change."""
    return (
        {n: type(m) for n, m in model.named_modules()},
        {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()},
        {n: id(b) for n, b in model.named_buffers()},
    )


MISTAKES = [
    ({"targets": "qproj"}, TargetError, ["qproj", "closest", "q_proj"]),
    ({"targets": ["q_proj", "v_proj"]}, TargetError, ["v_proj", "q_proj"]),
    ({"targets": []}, TargetError, ["all-linear"]),
    ({"targets": "q_proj", "train": ["heed"]}, TargetError, ["heed", "head"]),
    ({"targets": "norm"}, TargetError, ["LayerNorm", "train="]),
    ({"targets": "blocks"}, TargetError, ["containers", "q_proj"]),
    ({"targets": "q_(proj"}, TargetError, ["regular expression"]),
    ({"targets": 7}, TargetError, ["int"]),
    ({"targets": "q_proj", "name": "a.b"}, ConfigError, ["a.b", "letters"]),
    ({"targets": "q_proj", "name": ""}, ConfigError, ["name"]),
    ({"targets": "q_proj", "exclude": "q_prj"}, TargetError, ["q_prj"]),
    ({"targets": "q_proj", "layers": [7]}, TargetError, ["layers"]),
]


@pytest.mark.parametrize(("arguments", "error", "words"), MISTAKES, ids=lambda v: str(v)[:40])
def test_attach_refuses_and_leaves_the_model_alone(model, arguments, error, words):
    before = picture(model)
    with pytest.raises(error) as caught:
        dw.attach(model, dw.LoRA(rank=2), **arguments)
    for word in words:
        assert word in str(caught.value)
    assert picture(model) == before


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0}, {"rank": -1}, {"rank": True}, {"rank": 2.5}, {"rank": "8"},
        {"alpha": 0}, {"alpha": -1}, {"alpha": True}, {"alpha": float("nan")}, {"alpha": float("inf")},
        {"dropout": 1.0}, {"dropout": -0.1}, {"scaling": "alpha/r"}, {"init": "kaimin"}, {"dropout_at": "middle"},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options)) if "init" not in options else "did you mean 'kaiming'"):
        dw.LoRA(**options)


def test_two_targets_that_want_one_layer(model):
    before = picture(model)
    with pytest.raises(ConfigError, match="disjoint"):
        dw.attach(model, {"q_proj": dw.LoRA(rank=2), r"blocks\.0\..*proj": dw.LoRA(rank=4)})
    assert picture(model) == before


def test_names(model):
    dw.attach(model, dw.LoRA(rank=2), targets="q_proj", name="first")
    with pytest.raises(NameTaken, match="first"):
        dw.attach(model, dw.LoRA(rank=2), targets="k_proj", name="first")
    with pytest.raises(UnknownName, match="did you mean 'first'"), dw.use(model, "frist"):
        pass
    with pytest.raises(UnknownName):
        dw.detach(model, "second")
    with pytest.raises(ConfigError, match="finite"), dw.use(model, {"first": float("nan")}):
        pass


def test_train_is_exact(model):
    dw.attach(model, dw.LoRA(rank=2), targets="q_proj", train=["head"])
    assert {r.key for r in dw.summary(model).rows if r.variant == "Full()"} == {"head.weight", "head.bias"}


def test_weights_that_are_not_finite(model):
    with torch.no_grad():
        model.blocks[1].q_proj.weight[0, 0] = float("nan")
    before = picture(model)
    with pytest.raises(NonFinite, match=r"blocks\.1\.q_proj\.weight"):
        dw.attach(model, dw.LoRA(rank=2), targets="q_proj")
    assert picture(model) == before


def test_merge_refuses_a_broken_change_and_merges_nothing(model):
    dw.attach(model, dw.LoRA(rank=2), targets="q_proj")
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.blocks[1].q_proj.adapters._modules["default"]._modules["weight"].B.fill_(float("inf"))
    with pytest.raises(NonFinite, match=r"blocks\.1\.q_proj\.weight"):
        dw.merge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "adapters" not in n)


def test_merge_needs_weights_and_something_to_merge():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="no adapter"):
        dw.merge(model)
    with pytest.raises(ModelError, match="nothing is merged"):
        dw.unmerge(model)
    meta = nn.Sequential(nn.Linear(4, 4, device="meta"))
    dw.attach(meta, dw.LoRA(rank=2))
    with pytest.raises(ModelError, match="meta"):
        dw.merge(meta)


def test_what_cannot_be_done_while_merged(model):
    dw.attach(model, dw.LoRA(rank=2), targets="q_proj")
    dw.merge(model)
    for action in (
        lambda: dw.merge(model),
        lambda: dw.detach(model),
        lambda: dw.attach(model, dw.LoRA(rank=2), targets="k_proj", name="b"),
        lambda: dw.activate(model, "default"),
    ):
        with pytest.raises(ModelError, match=r"unmerge"):
            action()
    dw.unmerge(model)
    dw.merge(model, keep=None)
    with pytest.raises(ModelError, match="keep=None"):
        dw.unmerge(model)
    dw.detach(model)
    assert type(model.blocks[0].q_proj) is nn.Linear


def test_a_read_only_base_can_be_merged_and_is_not_written(tmp_path):
    """A weight on a read-only memory map: writing to it would end the process."""
    import numpy as np

    np.save(tmp_path / "w.npy", np.ones((4, 4), dtype=np.float32))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    with pytest.warns(UserWarning, match="not writable"):
        weight = torch.from_numpy(mapped)
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(weight)
    dw.attach(model, dw.LoRA(rank=2))
    with torch.no_grad():
        model[0].adapters._modules["default"]._modules["weight"].B.fill_(0.5)
    dw.merge(model)
    assert not torch.equal(model[0].weight, weight)
    dw.unmerge(model)
    assert model[0].weight.data_ptr() == weight.data_ptr()


def test_every_error_is_ours():
    for error in (TargetError, NameTaken, UnknownName, NonFinite, ModelError):
        assert issubclass(error, DeltawError)
