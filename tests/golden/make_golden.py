"""Made the folders and files beside it: one small adapter per format, and the dense ΔW that each means.

    python tests/golden/make_golden.py

It writes what is not there yet: what old files mean never changes, which is what the test is for. `peft-*` were written
by PEFT 0.21.2 itself; `deltaw-*` have a manifest of version 1, but for those whose name says another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw as dw
from deltaw.io.convert import convert
from deltaw.io.formats import Hints, formats
from deltaw.io.model_files import stored_shapes

HERE = Path(__file__).resolve().parent


class Layer(nn.Module):
    """Named as in a Llama model, so that GGUF has names for it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(8, 8, bias=False)
        self.self_attn.k_proj = nn.Linear(8, 4, bias=False)


class Golden(nn.Module):
    """The base of every golden adapter; its weights come from formulas, not from a generator that may change."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters()):
                parameter.copy_(wave(parameter.shape, n + 1.0))


def wave(shape: torch.Size, speed: float) -> Tensor:
    """Values in (-1, 1) that look irregular, computed in fp64 and exact in fp32."""
    count = torch.arange(shape.numel(), dtype=torch.float64)
    return (torch.remainder(count * speed * 0.6180339887, 1) * 2 - 1).mul(4096).round().div(4096).float().reshape(shape)


def filled(variant: Any, train: tuple[str, ...] = ()) -> tuple[nn.Module, dw.Adapter]:
    """A model with the variant on q_proj and k_proj, its tensors waves."""
    model = Golden()
    dw.attach(model, variant, ["q_proj", "k_proj"], train=train)
    with torch.no_grad():
        for n, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(wave(parameter.shape, n + 21.0))
    return model, dw.get(model)


HINTS = Hints(
    shapes=stored_shapes(Golden()),
    base={"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
)


def dense(adapter: dw.Adapter) -> dict[str, Tensor]:
    """Parameter -> the dense ΔW, or the copy."""
    weights = dict(Golden().named_parameters())
    return {k: c.delta_weight(weights[k].detach()).contiguous() for k, c in adapter.changes.items()}


def main() -> None:
    """Write everything."""
    import peft

    cases: dict[str, Any] = {
        "lora": dw.LoRA(rank=2, alpha=3),
        "rslora": dw.LoRA(rank=2, alpha=3, scaling="alpha/sqrt(rank)"),
        "plain-alpha": dw.LoRA(rank=2, alpha=0.5, scaling="alpha"),
        "dora": dw.DoRA(rank=2),
        "lora-manifest-2": dw.LoRA(rank=2, alpha=3),
    }
    for name, variant in cases.items():
        model, adapter = filled(variant, ("head",))
        target = HERE / f"deltaw-{name}"
        if target.exists():
            continue
        dw.save(model, target)
        save_file(dense(adapter), HERE / f"deltaw-{name}.expected.safetensors")
    for kind in ("loha", "lokr", "ia3", "vera", "adalora"):
        from deltaw.core.registry import variants

        options = {} if kind == "ia3" else {"rank": 2}
        options |= {"target": 1} if kind == "adalora" else {}
        model, adapter = filled(variants[kind](**options))
        target = HERE / f"deltaw-{kind}"
        if target.exists():
            continue
        dw.save(model, target)
        save_file(dense(adapter), HERE / f"deltaw-{kind}.expected.safetensors")
    _, adapter = filled(dw.LoRA(rank=2, alpha=3))
    for name, known in formats().items():
        target = HERE / f"as-{name}{known.suffix}"
        if target.exists():
            continue
        convert(adapter, name, target, HINTS)
    save_file(dense(adapter), HERE / "as.expected.safetensors")
    for name, config in {
        "lora": peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"], modules_to_save=["head"], bias="none"
        ),
        "dora": peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], use_dora=True, rank_pattern={"k_proj": 1}),
    }.items():
        if (HERE / f"peft-{name}").exists():
            continue
        theirs = peft.get_peft_model(Golden(), config)
        with torch.no_grad():
            for n, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
                parameter.copy_(wave(parameter.shape, n + 31.0))
        theirs.save_pretrained(HERE / f"peft-{name}")
        (HERE / f"peft-{name}" / "README.md").unlink(missing_ok=True)
        merged = theirs.merge_and_unload().state_dict()
        plain = dict(Golden().named_parameters())
        changed = {
            k: (merged[k] - plain[k].detach()).contiguous() for k in plain if not torch.equal(merged[k], plain[k])
        }
        save_file(changed, HERE / f"peft-{name}.expected.safetensors")


if __name__ == "__main__":
    main()
