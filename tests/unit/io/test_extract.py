"""Extract, check and doctor."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import AdapterError, ConfigError, ModelError
from deltaw.io import doctor
from deltaw.io.admission import admit
from deltaw.io.base_models import open_base
from deltaw.io.checking import check
from deltaw.io.inspection import inspect, text
from tests.unit.io.adapter_folders import net, shaken


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.up = nn.Linear(4, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.conv(self.words(ids).mT).mT))


def tuned_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base = Tied().double()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tuned, base


def test_full_rank_gives_the_fine_tune_back() -> None:
    tuned, base = tuned_pair()
    adapter = dw.extract(tuned, base, rank=10)
    assert max(adapter.error.values()) < 1e-7
    model = dw.load(copy.deepcopy(base), adapter)
    ids = torch.arange(10)[None]
    assert torch.allclose(model(ids), tuned(ids), atol=1e-9)
    assert adapter.changes["words.weight"].tied == ("head.weight",)


@pytest.mark.parametrize("rank", [1, 3])
def test_errors_are_those_of_the_best_approximation(rank: int) -> None:
    tuned, base = tuned_pair()
    adapter = dw.extract(tuned, base, rank=rank)
    for key in ("up.weight", "conv.weight"):
        D = (tuned.get_parameter(key) - base.get_parameter(key)).detach().flatten(1)
        S = torch.linalg.svdvals(D)
        best = math.sqrt(float(S[rank:].square().sum() / S.square().sum()))
        assert adapter.error[key] == pytest.approx(best, rel=1e-9)
        assert float((adapter.changes[key].delta_weight() - D).norm() / D.norm()) == pytest.approx(best, rel=1e-6)


def test_energy_takes_the_smallest_rank() -> None:
    tuned, base = tuned_pair()
    adapter = dw.extract(tuned, base, energy=0.9)
    D = (tuned.up.weight - base.up.weight).detach()
    share = torch.linalg.svdvals(D).square().cumsum(0) / D.square().sum()
    assert adapter.changes["up.weight"].variant.rank == int((share < 0.9).sum()) + 1
    assert adapter.error["up.weight"] ** 2 <= 0.1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, ConfigError),
        ({"rank": 1, "energy": 0.5}, ConfigError),
        ({"rank": 0}, ConfigError),
        ({"energy": 2}, ConfigError),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        dw.extract(*tuned_pair(), **arguments)


def test_nothing_to_extract_and_other_models() -> None:
    tuned, base = tuned_pair()
    with pytest.raises(AdapterError, match="the same"):
        dw.extract(copy.deepcopy(base), base, rank=1)
    with pytest.raises(AdapterError, match="other parameters"):
        dw.extract(tuned, net(), rank=1)


def test_from_plain_tensors() -> None:
    tuned, base = tuned_pair()
    one = dw.extract(tuned, base, rank=2)
    two = dw.extract(dict(tuned.named_parameters()), dict(base.named_parameters()), rank=2)
    assert torch.allclose(one.changes["up.weight"].delta_weight(), two.changes["up.weight"].delta_weight())


# ---- check


def saved(tmp_path: Path, variant: dw.LoRA | None = None) -> Path:
    model = net()
    dw.attach(model, variant or dw.LoRA(rank=2), ["first", "0"])
    return dw.save(shaken(model), tmp_path / "a")


def plain_base(tmp_path: Path, model: nn.Module) -> str:
    from safetensors.torch import save_file

    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_check_against_a_file_of_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert check(admit(folder), open_base(plain_base(tmp_path, net())), ())["fits"]
    other = nn.ModuleDict({"frist": nn.Linear(6, 5), "blocks": nn.ModuleList([nn.Linear(7, 5)])})
    answer = check(admit(folder), open_base(plain_base(tmp_path, other)), ())
    assert not answer["fine"]
    blocks, first = answer["problems"]
    assert "did you mean 'frist.weight'" in first
    assert "(5, 7)" in blocks


def test_check_builds_no_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "bert")
    dw.attach(model, dw.DoRA(rank=2), ["query"], train=["classifier"])
    dw.save(model, tmp_path / "a")
    admitted = admit(tmp_path / "a")
    base = open_base(str(tmp_path / "bert"), admitted.adapter)
    assert base.model is not None
    assert all(p.is_meta for p in base.model.parameters())
    answer = check(admitted, base, ("vllm", "peft"))
    assert answer["fits"]
    assert answer["readers"]["peft"]["reads"]
    assert any("DoRA" in why for why in answer["readers"]["vllm"]["refuses"])
    assert any("modules_to_save" in why for why in answer["readers"]["vllm"]["refuses"])
    with pytest.raises(AdapterError, match="no model"):
        open_base(str(tmp_path / "nothing"))


def test_inspect_is_json_and_text(tmp_path: Path) -> None:
    facts = inspect(saved(tmp_path))
    json.dumps(facts)
    assert facts["weights"] == 2
    assert facts["base"]["verifiable"]
    assert facts["readers"]["peft"] == "yes"
    adapter = dw.read(tmp_path / "a")
    norm = math.sqrt(sum(float(c.delta_weight().norm()) ** 2 for c in adapter.changes.values()))
    assert facts["norm"] == pytest.approx(norm, rel=1e-5)
    assert facts["digest"] in text(facts, every=True)


# ---- doctor


def test_doctor_finds_what_is_dead_and_what_explodes() -> None:
    model = net()
    dw.attach(model, dw.LoRA(rank=2), ["first", "0", "1"])
    x = torch.randn(4, 6)
    fresh = doctor(model, inputs=x)
    assert not fresh["effective"]
    assert len(fresh["dead"]) == 3
    shaken(model)
    with torch.no_grad():
        deltas = {
            path: host.deltas("default")["weight"] for path, host in (("first", model.first), ("0", model.blocks[0]))
        }
        deltas["first"].B.mul_(1000)
        deltas["0"].B.zero_()
    found = doctor(model, inputs=x)
    assert found["effective"]
    assert found["exploding"][0] == "first.weight"
    assert found["dead"] == ["blocks.0.weight"]
    assert not found["healthy"]
    with pytest.raises(ModelError, match="inputs="):
        doctor(model)


def test_doctor_lets_a_head_trained_in_full_grow() -> None:
    model = net()
    dw.attach(model, dw.LoRA(rank=2), ["0"], train=["first"])
    shaken(model)
    with torch.no_grad():
        model.first.deltas("default")["weight"].value.mul_(10)
    found = doctor(model, inputs=torch.randn(4, 6))
    assert found["weights"]["first.weight"]["change"] > 1
    assert "first.weight" not in found["exploding"]


def test_doctor_finds_a_layer_that_is_never_called() -> None:
    model = net()
    model.unused = nn.Linear(3, 3)
    dw.attach(model, dw.LoRA(rank=2), ["first", "unused"])
    found = doctor(shaken(model), inputs=torch.randn(4, 6))
    assert found["dead"] == ["unused.weight"]
    assert not found["weights"]["unused.weight"]["called"]
