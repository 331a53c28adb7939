"""Folders go both ways between PEFT and deltaw, and give the same outputs: LoRA, DoRA, patterns, biases, heads."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import deltaw as dw
from deltaw.io.inspection import inspect
from deltaw.io.notices import AdapterNotice

IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # so that a change of one layer is seen at the output
    return model


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load_peft(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT says so where keys are missing
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


OURS = {
    "lora": (dw.LoRA(rank=4, alpha=8, dropout=0.1), ["query", "value"]),
    "dora": (dw.DoRA(rank=4, alpha=8), "all-linear"),
    "rslora": (dw.LoRA(rank=4, alpha=6, scaling="alpha/sqrt(rank)"), ["query"]),
    "plain alpha": (dw.LoRA(rank=3, alpha=0.7, scaling="alpha"), ["dense"]),
    "one layer": (dw.LoRA(rank=4), r"layer\.1\..*query"),
    "bias": (dw.LoRA(rank=2, bias=True), ["query", "key"]),
}


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("head", [(), ("classifier",)])
def test_peft_reads_what_we_write(base: nn.Module, tmp_path: Path, case: str, head: tuple[str, ...]) -> None:
    variant, targets = OURS[case]
    model = copy.deepcopy(base)
    dw.attach(model, variant, targets, train=head)
    expected = logits(shaken(model))
    dw.save(model, tmp_path / "a")

    theirs = load_peft(base, tmp_path / "a")
    assert (logits(theirs) - expected).abs().max() < 1e-5
    assert (logits(base) - expected).abs().max() > 1e-3

    again = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dw.load(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)
    assert dw.read(tmp_path / "a").changes.keys() == dw.get(model).changes.keys()
    assert {c.variant for c in dw.read(tmp_path / "a").changes.values() if c.variant.kind != "full"} == {variant}


def test_mixed_ranks_and_scales(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    dw.attach(
        model,
        {
            r"layer\.0\..*(query|value)": dw.LoRA(rank=8),
            r"layer\.1\..*query": dw.LoRA(rank=2, alpha=5, scaling="alpha"),
            r"layer\.1\..*key": dw.LoRA(rank=2, alpha=5, scaling="alpha/sqrt(rank)"),
            "pooler.dense": dw.LoRA(rank=4, alpha=1),
        },
    )
    expected = logits(shaken(model))
    dw.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    paths = [key.removesuffix(".weight") for key in dw.get(model).changes]
    for field in ("rank_pattern", "alpha_pattern"):
        for path in paths:
            assert len([p for p in config[field] if re.match(rf"(.*\.)?({p})$", path)]) <= 1
    assert (logits(load_peft(base, tmp_path / "a")) - expected).abs().max() < 1e-5
    again = dw.load(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(logits(again), expected)


THEIRS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "dora": {"r": 4, "target_modules": ["query", "value"], "use_dora": True},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": r".*attention\..*(query|dense)", "use_rslora": True},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "target_modules": ["query", "value", "dense"],
        "rank_pattern": {"query": 2, r"layer.1.attention.output.dense": 6},
        "alpha_pattern": {"value": 5, r"^bert\.pooler\.dense": 3},
    },
    "layers": {"r": 4, "target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    "bias all": {"r": 4, "target_modules": ["query"], "bias": "all"},
    "bias lora_only": {"r": 4, "target_modules": ["query"], "bias": "lora_only"},
    "save pooler": {"r": 4, "target_modules": ["query"], "modules_to_save": ["pooler"]},
    "save norm": {"r": 4, "target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
    "excluded": {
        "r": 4,
        "target_modules": ["query", "value"],
        "exclude_modules": ["bert.encoder.layer.0.attention.self.query"],
    },
}


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_we_read_what_peft_writes(base: nn.Module, tmp_path: Path, case: str, task: str | None) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type=task, init_lora_weights=False, **THEIRS[case])
    )
    expected = logits(shaken(theirs))
    theirs.save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base)
    with pytest.warns(AdapterNotice, match="could not be verified"):
        dw.load(model, tmp_path / "a")
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (logits(base) - expected).abs().max() > 1e-3

    dw.save(model, tmp_path / "b")
    assert (logits(load_peft(base, tmp_path / "b")) - expected).abs().max() < 1e-5


def test_equal_adapters_are_equal_files(base: nn.Module, tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = copy.deepcopy(base)
        torch.manual_seed(3)
        dw.attach(model, dw.LoRA(rank=4), ["query"])
        dw.save(shaken(model), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors", "deltaw_manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_base_is_verified(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    dw.attach(model, dw.LoRA(rank=4), ["query"])
    dw.save(shaken(model), tmp_path / "a")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.bert.pooler.dense.weight[3, 4] += 1e-4
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(dw.errors.BaseMismatch, match=r"1 of \d+ parameters differ\n  bert.pooler.dense.weight"):
        dw.load(other, tmp_path / "a")
    assert type(other.bert.pooler.dense) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.warns(AdapterNotice, match="accepted"):
        dw.load(other, tmp_path / "a", allow_base_mismatch=True)
    for precise in (base.__class__.half, base.__class__.bfloat16, lambda m: m.half().float()):
        with pytest.warns(AdapterNotice, match="same base in another precision"):
            dw.load(precise(copy.deepcopy(base)), tmp_path / "a")


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 3}])
def test_starts_that_rewrite_the_base(base: nn.Module, tmp_path: Path, start: str, options: dict[str, object]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=start, **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shaken(theirs).save_pretrained(tmp_path / "a")
    expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval())
    with pytest.raises(dw.errors.AdapterError, match="takes out of the base"):
        dw.read(tmp_path / "a")
    model = copy.deepcopy(base)
    with pytest.warns(AdapterNotice, match="computed from this base"):
        dw.load(model, tmp_path / "a")
    assert (logits(model) - expected).abs().max() < 1e-4
    dw.save(model, tmp_path / "b")  # and now it is a plain adapter
    assert (logits(load_peft(base, tmp_path / "b")) - expected).abs().max() < 1e-4
    assert dw.read(tmp_path / "b").changes.keys() == dw.get(model).changes.keys()


def test_a_random_start_is_refused_with_the_way_out(base: nn.Module, tmp_path: Path) -> None:
    """PEFT draws a new sketch at every load: what the adapter changes is not in the file, nor in the base."""
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa_niter_4")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT wants it of the adapter at the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa_niter_4"
    expected = logits(shaken(theirs))
    theirs.save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base)
    with pytest.raises(dw.errors.AdapterError, match=r"random sketch.*path_initial_model_for_weight_conversion"):
        dw.load(model, tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.warns(AdapterNotice, match="could not be verified"):
        dw.load(model, tmp_path / "b")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_start_is_taken_away_exactly_from_large_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(1600, 1550, bias=False)), torch.randn(2, 1600)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    )
    theirs.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(dw.load(copy.deepcopy(base), tmp_path / "a")(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_head_alone(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    dw.attach(model, {"classifier": dw.Full()})
    expected = logits(shaken(model))
    dw.save(model, tmp_path / "a")
    # PEFT loads no file that adapts no layer: it is written in deltaw's own grammar, which PEFT rejects
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "DELTAW"
    assert torch.equal(logits(dw.load(copy.deepcopy(base), tmp_path / "a")), expected)
    with pytest.raises((KeyError, ValueError, TypeError)):
        load_peft(base, tmp_path / "a")


def test_only_tokens(base: nn.Module, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(
        target_modules=["word_embeddings"], token_indices=[1, 7, 30], init_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    expected = logits(shaken(theirs))
    theirs.save_pretrained(tmp_path / "a")
    model = dw.load(copy.deepcopy(base), tmp_path / "a")
    assert (logits(model) - expected).abs().max() < 1e-5
    dw.save(model, tmp_path / "b")
    assert (logits(load_peft(base, tmp_path / "b")) - expected).abs().max() < 1e-5


def test_unknown_fields_are_named(base: nn.Module, tmp_path: Path) -> None:
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_newest_trick": True}))
    with pytest.warns(AdapterNotice, match="use_newest_trick"):
        dw.read(tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
def test_a_renamed_base(base: nn.Module, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        copy.deepcopy(base.bert), peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    )
    shaken(theirs).save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base)
    with pytest.raises(dw.errors.AdapterError, match=r"rename=\{'': 'bert'\}"):
        dw.load(model, tmp_path / "a")
    dw.load(model, tmp_path / "a", rename={"": "bert"})
    with torch.no_grad():
        hidden = theirs(input_ids=IDS).last_hidden_state
        assert (model.bert(input_ids=IDS).last_hidden_state - hidden).abs().max() < 1e-5
    dw.save(model, tmp_path / "b")
    dw.load(copy.deepcopy(base.bert), tmp_path / "b", rename={"bert": ""}, allow_base_mismatch=True)
    with pytest.raises(dw.errors.AdapterError, match=r"rename=\{'bert': ''\}"):
        dw.load(copy.deepcopy(base.bert), tmp_path / "b")
    with pytest.raises(dw.errors.AdapterError, match="no parameter of the adapter starts with"):
        dw.load(copy.deepcopy(base), tmp_path / "b", rename={"bart": "bert"})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_layers_that_peft_ties_on_request(tmp_path: Path, options: dict[str, list[str]]) -> None:
    """`ensure_weight_tying`: the file has tensors for the head, which the config does not name, or for the embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = Qwen2ForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    tied = peft.LoraConfig(r=4, ensure_weight_tying=True, **options)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(model), tied))
    theirs.save_pretrained(tmp_path / "a")
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(model))
    torch.testing.assert_close(logits(dw.load(model, tmp_path / "a")), expected, rtol=1e-5, atol=1e-5)
    dw.save(model, tmp_path / "b")  # in our own words: one change of two layers
    torch.testing.assert_close(logits(dw.load(copy.deepcopy(plain), tmp_path / "b")), expected, rtol=1e-5, atol=1e-5)
    dw.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    dw.unmerge(model)
    if "modules_to_save" in options:
        return
    untied = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"ensure_weight_tying": False}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(untied))
    dw.detach(model)
    with pytest.raises(dw.errors.AdapterError, match="does not target"):
        dw.load(model, tmp_path / "a")


def test_what_a_value_of_peft_cannot_say_by_itself(tmp_path):
    """Trainable tokens follow the tie of the base; an embedding that the file carries along is named."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )

    def llama(tied: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        config.tie_word_embeddings = tied
        return LlamaForCausalLM(config).eval()

    ids = torch.tensor([[1, 2, 3]])
    model = peft.get_peft_model(
        llama(True), peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tokens")
    expected = model.eval()(ids).logits
    dw.write(dw.read(tmp_path / "tokens"), tmp_path / "again")
    for source in (tmp_path / "tokens", dw.read(tmp_path / "tokens"), tmp_path / "again"):
        torch.testing.assert_close(dw.load(llama(True), source)(ids).logits, expected)

    model = peft.get_peft_model(llama(False), peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path / "embedding")
    with pytest.warns(AdapterNotice, match="embed_tokens.weight', a weight of the base that the file carries along"):
        dw.read(tmp_path / "embedding")


CONV1D = {"both sides": (8, 6, 3), "a kernel of one": (8, 6, 1), "a prime number of inputs": (7, 6, 3)}


@pytest.mark.parametrize("sizes", CONV1D.values(), ids=CONV1D)
def test_lokr_over_conv1d_is_what_peft_computes(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    """PEFT multiplies w1 (a, c) by a whole w2 (b, d, kernel) in another order than over any other layer."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv1d(*sizes)).eval(), torch.randn(2, sizes[0], 9)
    config = peft.LoKrConfig(r=8, alpha=3, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base)
    with pytest.warns(AdapterNotice, match="another order than LoKr's formula"):
        dw.load(model, tmp_path / "a")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base(x), theirs(x), atol=1e-2)
    dw.save(model, tmp_path / "b")
    assert torch.equal(dw.load(copy.deepcopy(base), tmp_path / "b")(x), model(x))


@pytest.mark.parametrize(("factor", "grammar"), [(2, "DELTAW"), (1, "LOKR")])
def test_lokr_over_conv1d_that_peft_would_misread_is_ours(tmp_path: Path, factor: int, grammar: str) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv1d(8, 6, 1)).eval(), torch.randn(2, 8, 9)
    model = shaken(dw.attach(copy.deepcopy(base), dw.LoKr(rank=8, factor=factor), ["0"]))
    dw.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == grammar
    assert torch.equal(dw.load(copy.deepcopy(base), tmp_path / "a")(x), model(x))
    if grammar == "LOKR":
        torch.testing.assert_close(load_peft(base, tmp_path / "a")(x), model(x), rtol=1e-5, atol=1e-5)


def experts(folder: Path, parameters: list[str]) -> tuple[nn.Module, nn.Module]:
    """(a Mixtral, the same adapted by PEFT), saved in `folder` with the parameters in this order."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes)
    base = MixtralForCausalLM(config).eval()
    options = {"target_modules": ["q_proj"], "target_parameters": parameters, "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **options)).eval()
    theirs.save_pretrained(folder)
    file = folder / "adapter_config.json"  # PEFT keeps a set, whose order differs from run to run
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": parameters}))
    return base, theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "parameters",
    [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj", "experts.gate_up_proj"], ["down_proj"]],
    ids=" ".join,
)
def test_expert_weights_without_their_model(tmp_path: Path, parameters: list[str]) -> None:
    base, theirs = experts(tmp_path / "a", parameters)
    adapter = dw.read(tmp_path / "a")
    dw.write(adapter, tmp_path / "b", grammar="PEFT")
    assert torch.equal(logits(load_peft(base, tmp_path / "b")), logits(theirs))
    assert torch.equal(logits(dw.load(copy.deepcopy(base), tmp_path / "b")), logits(theirs))
    reverse = adapter.replace(changes=dict(reversed(adapter.changes.items())))
    dw.write(reverse, tmp_path / "c", grammar="PEFT")
    assert torch.equal(logits(load_peft(base, tmp_path / "c")), logits(theirs))
    half = dw.combine([adapter, adapter], [0.25, 0.25], how="linear")
    dw.write(half, tmp_path / "d", grammar="PEFT")
    expected = logits(dw.install(copy.deepcopy(base), half))
    torch.testing.assert_close(logits(load_peft(base, tmp_path / "d")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_servers_are_told_of_expert_weights_however_they_were_saved(tmp_path: Path) -> None:
    base, _ = experts(tmp_path / "a", ["experts.down_proj"])
    dw.save(dw.load(base, tmp_path / "a"), tmp_path / "b")
    readers = inspect(tmp_path / "a")["readers"]
    assert readers == inspect(tmp_path / "b")["readers"]
    assert readers["vllm"].startswith("refuses: layers of the family module")


@pytest.mark.filterwarnings("ignore")
def test_parameters_whose_order_nothing_tells_need_the_model(tmp_path: Path) -> None:
    """Two parameters of one module: the file tells them apart only by the order in which the model registers them."""
    experts(tmp_path / "a", ["experts.gate_up_proj", "experts.down_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(file.read_text().replace("gate_up_proj", "first").replace("down_proj", "second"))
    with pytest.raises(dw.errors.AdapterError, match="only the model can tell"):
        dw.read(tmp_path / "a")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, **sizes)).eval()


@pytest.mark.parametrize("variant", [dw.LoHa(rank=2), dw.LoKr(rank=2)], ids=repr)
@pytest.mark.parametrize("model", [gpt2(), nn.Sequential(nn.Conv3d(4, 6, 1))], ids=["gpt2", "conv3d"])
def test_layers_that_peft_refuses_are_said_in_our_words(tmp_path: Path, model: nn.Module, variant: object) -> None:
    ours = shaken(dw.attach(copy.deepcopy(model), variant, ["c_attn" if hasattr(model, "config") else "0"]))
    with pytest.warns(AdapterNotice, match="deltaw's own words.* does not adapt layers of the family"):
        dw.save(ours, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "DELTAW"
    again = dw.load(copy.deepcopy(model), tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


WITHOUT_MODEL = {
    "tied tokens": (gpt2(), IDS, peft.TrainableTokensConfig(token_indices=[1, 7], init_weights=False)),
    "ia3 over conv2d": (
        nn.Sequential(nn.Conv2d(4, 6, 3)).eval(),
        torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
    ),
    "lokr over conv2d": (
        nn.Sequential(nn.Conv2d(4, 6, 3)).eval(),
        torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)),
        peft.LoKrConfig(r=8, target_modules=["0"], init_weights=False),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WITHOUT_MODEL)
def test_peft_reads_what_was_written_without_the_model(tmp_path: Path, case: str) -> None:
    base, x, config = WITHOUT_MODEL[case]

    def output(model: nn.Module) -> torch.Tensor:
        found = model(x)
        return found if isinstance(found, torch.Tensor) else found.logits

    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)))
    theirs.save_pretrained(tmp_path / "a")
    adapter = dw.read(tmp_path / "a")
    dw.write(adapter, tmp_path / "b", grammar="PEFT")
    assert torch.equal(output(load_peft(base, tmp_path / "b")), output(theirs))
    torch.testing.assert_close(output(dw.load(copy.deepcopy(base), adapter)), output(theirs), rtol=1e-5, atol=1e-5)


def test_ia3_on_inputs_of_a_convolution_needs_the_model(tmp_path: Path) -> None:
    """Its matrix has a column for every place of the kernel; a factor for each of them is none of PEFT's words."""
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).eval()
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "a")
    with pytest.raises(dw.errors.AdapterError, match="only the model can tell"):
        dw.read(tmp_path / "a")
    grouped = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(dw.errors.AdapterError, match="of each group"):
        dw.load(grouped, tmp_path / "a")
    with pytest.warns(AdapterNotice, match="place by place of the kernel"):
        dw.save(shaken(dw.attach(base, dw.IA3(of="input"), ["0"])), tmp_path / "b")


@pytest.mark.filterwarnings("ignore")
def test_adalora_that_cut_every_direction_of_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    schedule = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 6}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(target_modules=["0", "2"], **schedule))
    with torch.no_grad():
        theirs.base_model.model[2].lora_E["default"].add_(1)  # the layer that matters
    for step in range(7):
        theirs(x).tanh().mean().backward()
        theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(tmp_path / "a")
    assert min(t.numel() for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()) == 0
    model = dw.load(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base(x), theirs(x), atol=1e-3)
    dw.write(dw.read(tmp_path / "a"), tmp_path / "b")
    torch.testing.assert_close(load_peft(base, tmp_path / "b")(x), theirs(x), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": None}))
    with pytest.raises(dw.errors.AdapterError, match="not 4 directions"):
        dw.read(tmp_path / "a")
