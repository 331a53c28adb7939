"""A grid of configurations that PEFT itself made: what it saved gives the same outputs here, and what we save gives them there.

Each case: PEFT adapts a tiny model with random adapter values and saves; deltaw loads it (outputs agree), saves it anew, and
PEFT loads that (outputs agree again).
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import deltaw as dw

Case = tuple[str, Any]


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.q = nn.Linear(size, size, bias=False)
        self.k = nn.Linear(size, size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(self.q(x) * self.k(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Net().double().eval(), (torch.randn(4, 8, dtype=torch.float64),)


def gpt2() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=12, n_layer=2, n_head=2, n_inner=20)
    model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model, (torch.randint(0, 30, (2, 6)),)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(2, 4, (3, 2), padding=1, dilation=1, bias=False)
        self.point = nn.Conv2d(4, 5, 1)
        self.three = nn.Conv3d(5, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)  # (n, 6, 4)
        y = self.point(torch.tanh(self.two(y.view(-1, 2, 3, 4))))  # (n, 5, 3, 5)
        return self.three(torch.stack([y, y * y], -1))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(3, 6, 8), (3, 8, 6)] if transposed else [(3, 8, 6), (3, 6, 8)]
        self.up = nn.Parameter(torch.randn(shapes[0]))
        self.down = nn.Parameter(torch.randn(shapes[1]))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        return torch.einsum("eoh,ebh->bo", down, torch.tanh(torch.einsum("ehi,bi->ebh", up, x)))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Experts(False)
        self.second = Experts(True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.second(x + self.first(x)))


def convolutions() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Convolutions().double().eval(), (torch.randn(2, 3, 8, dtype=torch.float64),)


def reader() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Reader().double().eval(), (torch.randint(0, 20, (3, 5)),)


def mixture() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Mixture().double().eval(), (torch.randn(4, 6, dtype=torch.float64),)


MODELS = {"net": net, "gpt2": gpt2, "convolutions": convolutions, "reader": reader, "mixture": mixture}
TARGETS: list[Any] = [["q", "k"], ["up", "down"], "all-linear", r"layers\.1\.(q|up)", ["layers.0.q", "head"]]


def lora_cases() -> Iterator[tuple[str, str, Any]]:
    """LoRA and DoRA: 5 targets x 4 ranks and alphas x rsLoRA x DoRA x 3 bias modes, and what goes with them."""
    sizes = [(1, 1), (4, 8), (3, 5), (8, 2)]
    for (n, targets), (rank, alpha), rs, dora in itertools.product(
        enumerate(TARGETS), sizes, (False, True), (False, True)
    ):
        for bias in ("none", "all", "lora_only"):
            yield (
                f"lora-{n}-r{rank}-a{alpha}-{'rs' if rs else ''}-{'dora' if dora else ''}-{bias}",
                "net",
                peft.LoraConfig(
                    r=rank,
                    lora_alpha=alpha,
                    target_modules=targets,
                    use_rslora=rs,
                    use_dora=dora,
                    bias=bias,
                    init_lora_weights=False,
                ),
            )
    more: dict[str, dict[str, Any]] = {
        "rank pattern": {"rank_pattern": {"q": 2, r"layers\.1\.k": 6}},
        "alpha pattern": {"alpha_pattern": {"layers.0.q": 3, "k": 7}},
        "both patterns": {"rank_pattern": {"layers.0.q": 1}, "alpha_pattern": {"q": 9}, "use_rslora": True},
        "anchored": {"rank_pattern": {"^layers.1.q": 5}},
        "overlapping": {"alpha_pattern": {"q": 16, "layers.0.q": 32}},
        "layers": {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        "layers by name": {"layers_to_transform": 0, "layers_pattern": "layers"},
        "excluded": {"exclude_modules": ["layers.0.k"]},
        "excluded by regex": {"exclude_modules": r".*\.1\.k"},
        "save": {"modules_to_save": ["head"]},
        "save two": {"modules_to_save": ["head", "norm"]},
        "save and bias": {"modules_to_save": ["head"], "bias": "all"},
        "lora bias": {"lora_bias": True},
        "lora bias and bias": {"lora_bias": True, "bias": "lora_only"},
        "lora bias and all biases": {"lora_bias": True, "bias": "all"},
        "dropout": {"lora_dropout": 0.3},
    }
    for (name, options), dora in itertools.product(more.items(), (False, True)):
        if "lora_bias" in options and dora:
            continue  # PEFT refuses it
        targets = ["k", "up"] if "lora_bias" in options else ["q", "k"]
        yield (
            f"lora-{name}{'-dora' if dora else ''}",
            "net",
            peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=targets, use_dora=dora, init_lora_weights=False, **options
            ),
        )
    for targets, dora, rs in itertools.product(
        (["c_attn"], ["c_attn", "c_proj", "c_fc"]), (False, True), (False, True)
    ):
        yield (
            f"gpt2-{len(targets)}-{dora}-{rs}",
            "gpt2",
            peft.LoraConfig(
                r=3,
                lora_alpha=4,
                target_modules=targets,
                use_dora=dora,
                use_rslora=rs,
                fan_in_fan_out=True,
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            ),
        )


def other_cases() -> Iterator[tuple[str, str, Any]]:
    """LoHa, LoKr, IA3, VeRA, AdaLoRA."""
    for (n, targets), rank, alpha in itertools.product(enumerate(TARGETS[:4]), (1, 4), (4, 3)):
        yield (
            f"loha-{n}-{rank}-{alpha}",
            "net",
            peft.LoHaConfig(r=rank, alpha=alpha, target_modules=targets, init_weights=False),
        )
        for both, factor in ((False, -1), (True, -1), (False, 2), (True, 4)):
            yield (
                f"lokr-{n}-{rank}-{alpha}-{both}-{factor}",
                "net",
                peft.LoKrConfig(
                    r=rank,
                    alpha=alpha,
                    target_modules=targets,
                    decompose_both=both,
                    decompose_factor=factor,
                    init_weights=False,
                ),
            )
    for save in (None, ["head"]):
        yield (
            f"loha-patterns-{save}",
            "net",
            peft.LoHaConfig(
                r=4,
                alpha=8,
                target_modules=["q", "k"],
                rank_pattern={"q": 2},
                alpha_pattern={"layers.0.k": 3},
                init_weights=False,
                modules_to_save=save,
            ),
        )
        for inner in ([], ["down"], ["up", "down"]):
            yield (
                f"ia3-{len(inner)}-{save}",
                "net",
                peft.IA3Config(
                    target_modules=["q", "k", *inner],
                    feedforward_modules=inner,
                    init_ia3_weights=False,
                    modules_to_save=save,
                ),
            )
        for targets in (["q", "k"], ["up"], ["up", "down", "k"]):
            yield (
                f"vera-{len(targets)}-{save}",
                "net",
                peft.VeraConfig(r=6, target_modules=targets, init_weights=False, modules_to_save=save),
            )
            yield (
                f"adalora-{len(targets)}-{save}",
                "net",
                peft.AdaLoraConfig(
                    init_r=6,
                    target_r=3,
                    lora_alpha=5,
                    target_modules=targets,
                    total_step=10,
                    init_lora_weights=False,
                    modules_to_save=save,
                ),
            )
    for targets in ("transformer.wte", ["wte"]):  # a head tied to it is in the file too
        config = peft.TrainableTokensConfig(token_indices=[3, 7], target_modules=targets, init_weights=False)
        yield f"only tokens-{targets}", "gpt2", config
    for indices in ([3, 7], {"wte": [0, 29, 5]}):
        yield (
            f"trainable tokens-{len(indices)}",
            "gpt2",
            peft.LoraConfig(
                r=2,
                target_modules=["c_attn"],
                fan_in_fan_out=True,
                trainable_token_indices=indices,
                init_lora_weights=False,
            ),
        )


def layer_cases() -> Iterator[tuple[str, str, Any]]:
    """Convolutions, embeddings, nn.MultiheadAttention, raw parameters."""
    for name, rs, dora in itertools.product(("one", "two", "point", "three"), (False, True), (False, True)):
        options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
        yield (
            f"conv-{name}-{rs}-{dora}",
            "convolutions",
            peft.LoraConfig(target_modules=[name], use_rslora=rs, use_dora=dora, **options),
        )
    for name in ("one", "two", "point"):
        yield (
            f"loha-conv-{name}",
            "convolutions",
            peft.LoHaConfig(r=2, alpha=3, target_modules=[name], init_weights=False),
        )
        if name != "point":
            config = peft.LoHaConfig(r=2, alpha=3, target_modules=[name], init_weights=False, use_effective_conv2d=True)
            yield f"loha-tucker-{name}", "convolutions", config
        for effective in (False, True):
            config = peft.LoKrConfig(
                r=1, alpha=3, target_modules=[name], init_weights=False, use_effective_conv2d=effective
            )
            yield f"lokr-conv-{name}-{effective}", "convolutions", config
    for name, both in itertools.product(("two", "point"), (False, True)):  # the second factor whole
        config = peft.LoKrConfig(r=2, alpha=3, target_modules=[name], decompose_both=both, init_weights=False)
        yield f"lokr-conv-whole-{name}-{both}", "convolutions", config
    for name, inner in itertools.product(("two", "point", "three"), (False, True)):
        config = peft.IA3Config(
            target_modules=[name], feedforward_modules=[name] if inner else [], init_ia3_weights=False
        )
        yield f"ia3-conv-{name}-{inner}", "convolutions", config
    for rs, dora in itertools.product((False, True), (False, True)):
        config = peft.LoraConfig(r=3, target_modules=["words"], use_rslora=rs, use_dora=dora, init_lora_weights=False)
        yield f"embedding-{rs}-{dora}", "reader", config
    for rs, bias in itertools.product((False, True), ("none", "all")):
        config = peft.LoraConfig(r=3, target_modules=["attention"], use_rslora=rs, bias=bias, init_lora_weights=False)
        yield f"attention-{rs}-{bias}", "reader", config
    yield (
        "attention-patterns",
        "reader",
        peft.LoraConfig(
            r=3,
            target_modules=["attention", "words", "out"],
            rank_pattern={"attention": 2},
            alpha_pattern={"words": 5},
            init_lora_weights=False,
        ),
    )
    for names in (["up"], ["down"], ["up", "down"], ["first.up", "second.down"], ["first.down", "first.up"]):
        for rs in (False, True):
            config = peft.LoraConfig(
                r=2, target_modules=[], target_parameters=names, use_rslora=rs, init_lora_weights=False
            )
            yield f"experts-{'-'.join(names)}-{rs}", "mixture", config
    config = peft.LoraConfig(
        r=2,
        target_modules=["out"],
        target_parameters=["up", "down"],
        rank_pattern={"first.up": 3},
        init_lora_weights=False,
    )
    yield "experts-and-linear", "mixture", config


CASES = [*layer_cases(), *lora_cases(), *other_cases()]


def test_the_grid_is_large() -> None:
    assert len(CASES) >= 300
    assert len({name for name, _, _ in CASES}) == len(CASES)


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)
    return model.eval()


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(*inputs)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("which", "config"), [pytest.param(m, c, id=name) for name, m, c in CASES])
def test_both_ways(tmp_path: Path, which: str, config: Any) -> None:
    base, inputs = MODELS[which]()
    torch.manual_seed(5)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config), autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "theirs", autocast_adapter_dtype=False
    ).eval()
    expected = output(again, inputs)  # as PEFT reads it: overlapping patterns are not what was trained

    ours = dw.load(copy.deepcopy(base), tmp_path / "theirs")
    assert (output(ours, inputs) - expected).abs().max() < 1e-10
    assert (output(base, inputs) - expected).abs().max() > 1e-6

    dw.save(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        back = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "ours", autocast_adapter_dtype=False
        ).eval()
    assert (output(back, inputs) - expected).abs().max() < 1e-10
    assert torch.equal(output(dw.load(copy.deepcopy(base), tmp_path / "ours"), inputs), output(ours, inputs))
