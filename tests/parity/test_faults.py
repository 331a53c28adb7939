"""The faults measured in PEFT 0.21.2 (docs of this project number them) that must not exist here; layers' own: test_layers.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltaw as dw
from deltaw.errors import AdapterError, BaseMismatch, NameTaken, TargetError
from tests.laws.conftest import shaken

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two blocks with q and k, a head and a subhead."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.subhead = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.layers:
            x = torch.tanh(block["q"](x) + block["k"](x))
        return self.head(x) + self.subhead(x)


def trained(tmp_path, variant=None, seed=1, **options):
    model = dw.attach(Net(), variant or dw.LoRA(rank=2), **({"targets": ["q"]} | options))
    shaken(model, seed).eval()
    dw.save(model, tmp_path / "a")
    return model


def test_fault_1_a_half_wrong_target_list_is_refused():
    with pytest.raises(TargetError, match="'v'"):
        dw.attach(Net(), dw.LoRA(rank=2), targets=["q", "v"])


@pytest.mark.parametrize("damage", ["extra", "renamed", "missing"])
def test_fault_2_no_tensor_is_dropped_in_silence(tmp_path, damage):
    trained(tmp_path)
    file = tmp_path / "a" / "adapter_model.safetensors"
    (tmp_path / "a" / "MANIFEST.json").unlink(missing_ok=True)
    for other in (tmp_path / "a").iterdir():
        if other.name not in ("adapter_config.json", "adapter_model.safetensors"):
            other.unlink()  # as PEFT would have written it: without anything of ours to check against
    tensors = load_file(file)
    if damage == "extra":
        tensors["base_model.model.layers.7.q.lora_A.weight"] = torch.zeros(2, 8)
    elif damage == "renamed":
        tensors = {k.replace("layers", "blocks"): t for k, t in tensors.items()}
    else:
        tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    model = Net()
    before = model(X)
    with pytest.raises(AdapterError):
        dw.load(model, tmp_path / "a")
    assert type(model.layers[0]["q"]) is nn.Linear
    assert torch.equal(model(X), before)


def test_fault_4_bf16_merge_and_unmerge_restore_every_entry():
    model = Net().to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dw.attach(model, dw.LoRA(rank=4))
    shaken(model, size=0.05)
    report = dw.merge(model)
    assert max(w.unmoved for w in report.weights) > 0  # a small change is partly lost in 16 bit, and it is said
    dw.unmerge(model)
    dw.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fault_5_replacing_tensors_keeps_each_modules_own_scale():
    model = dw.attach(Net(), {"q": dw.LoRA(rank=2, alpha=8), "k": dw.LoRA(rank=4, alpha=4)})
    other = dw.get(shaken(dw.attach(Net(), {"q": dw.LoRA(rank=2, alpha=8), "k": dw.LoRA(rank=4, alpha=4)}), 5))
    dw.replace(model, "default", other)
    fresh = dw.install(Net(), other)
    assert torch.equal(model.eval()(X), fresh.eval()(X))


def test_fault_7_a_name_that_is_taken_is_an_error():
    model = dw.attach(Net(), dw.LoRA(rank=2), targets=["q"], name="a")
    with pytest.raises(NameTaken):
        dw.install(model, dw.get(model, "a"), "a")


@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.Full()], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_fault_9_mixed_batches_work_with_dora_and_in_training(variant, training):
    model = Net()
    for name, seed in (("a", 1), ("b", 2)):
        dw.attach(model, variant, targets=["q"], name=name)
        shaken(model, seed)
    model.train(training)
    names = ["a", None, "b", "b", "a"]
    with dw.rows(model, names):
        mixed = model(X)
    for i, name in enumerate(names):
        with dw.use(model, name):
            torch.testing.assert_close(mixed[i], model(X[i : i + 1])[0], rtol=1e-5, atol=1e-6)


def test_fault_10_head_does_not_mean_subhead():
    model = dw.attach(Net(), dw.LoRA(rank=2), targets=["q"], train=["head"])
    assert type(model.subhead) is nn.Linear
    assert {r.key for r in dw.summary(model).rows if "head" in r.key} == {"head.weight", "head.bias"}


def test_fault_11_another_base_of_the_same_shape_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(BaseMismatch):
        dw.load(Net(seed=9), tmp_path / "a")
    dw.load(Net(seed=9), tmp_path / "a", allow_base_mismatch=True)


def test_fault_12_loading_for_training_is_said_and_checked(tmp_path):
    trained(tmp_path)
    model = Net()
    dw.load(model, tmp_path / "a", trainable=True)
    assert dw.summary(model).trainable > 0
    frozen = Net()
    dw.load(frozen, tmp_path / "a")
    with pytest.raises(dw.errors.ModelError, match="trainable=True"):
        dw.param_groups(frozen, lr=1e-3)


def test_fault_13_overlapping_patterns_are_refused_and_never_written(tmp_path):
    with pytest.raises(dw.errors.ConfigError, match="disjoint"):
        dw.attach(Net(), {"q": dw.LoRA(rank=2, alpha=16), r"layers\.0\.q": dw.LoRA(rank=2, alpha=32)})
    model = dw.attach(Net(), {r"layers\.0\.q": dw.LoRA(rank=2, alpha=32), r"layers\.1\.q": dw.LoRA(rank=2, alpha=16)})
    shaken(model).eval()
    dw.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    names = list(config.get("alpha_pattern", {}))
    assert not any(a != b and (a.endswith("." + b)) for a in names for b in names)
    again = Net()
    dw.load(again, tmp_path / "a")
    assert torch.equal(again.eval()(X), model(X))


def test_fault_15_running_statistics_stand_still_and_trained_ones_are_saved(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))

    model = dw.attach(build(), dw.LoRA(rank=2), targets=["0"], train=["3"])
    still = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("1.")}
    base = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("3.running")}
    model.train()
    for _ in range(3):
        model(X)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in (still | base).items())
    moved = dw.get(model).changes["3.running_mean"].tensors["value"]
    assert not torch.equal(moved, base["3.running_mean"])
    dw.save(model, tmp_path / "a")
    again = build()
    dw.load(again, tmp_path / "a")
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_fault_17_rows_are_right_where_a_layer_sees_no_rows():
    """DeBERTa's q and v also project the relative embeddings, whose first dimension is not the batch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        relative_attention=True, position_buckets=4, max_relative_positions=8, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.DebertaV2Model(config).eval()
    for name, seed in (("a", 1), ("b", 2)):
        dw.attach(model, dw.LoRA(rank=2), targets=["query_proj", "value_proj"], name=name)
        shaken(model, seed)
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    names = ["a", None, "b", "a"]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="query_proj"), dw.rows(model, names):
            mixed = model(ids)[0]
        for i, name in enumerate(names):
            with dw.use(model, name):
                torch.testing.assert_close(mixed[i], model(ids[i : i + 1])[0][0], rtol=1e-5, atol=1e-6)
