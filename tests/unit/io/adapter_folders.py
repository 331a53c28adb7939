"""A tiny model and its adapter in three kinds of folder: ours, ours without its manifest, and PEFT's."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw as dw
from deltaw.io.folder import CONFIG, MANIFEST, WEIGHTS

KINDS = ("ours", "ours without manifest", "peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(kind: str, folder: Path) -> Path:
    """An adapter of `net()` in a folder of that kind."""
    if kind == "peft":
        config = peft.LoraConfig(
            r=2, target_modules=["first", "0", "1"], modules_to_save=["head"], init_lora_weights=False
        )
        torch.manual_seed(2)
        shaken(peft.get_peft_model(net(), config)).save_pretrained(folder)
        return folder
    model = net()
    dw.attach(model, dw.LoRA(rank=2), ["first", "0", "1"], train=["head"])
    dw.save(shaken(model), folder)
    if "without" in kind:
        (folder / MANIFEST).unlink()
    return folder


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) as they lie in the files."""
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def put(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    """A folder as a foreign tool would write it: no manifest, no checksum."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def bits(model: nn.Module) -> tuple[Any, ...]:
    """All that a refused load must leave as it was."""
    return (
        tuple((n, type(m)) for n, m in model.named_modules()),
        tuple((n, p.requires_grad, p.detach().numpy().tobytes()) for n, p in model.named_parameters()),
        tuple((n, b.numpy().tobytes()) for n, b in model.named_buffers()),
    )


def fresh(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
