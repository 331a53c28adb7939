"""GGUF adapters for llama.cpp and Ollama: `<gguf name>.lora_a` (r, in), `.lora_b` (out, r), one alpha, scale alpha/r per tensor.

Names and the order of q and k rows are llama.cpp's (rotary pairs are interleaved in some architectures), so the base's
config is needed: model_type, number of blocks and heads. Scales that one alpha cannot give go into B. Our files also
keep the original names, so that they are read back without the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, MissingExtra
from deltaw.io import strict_json
from deltaw.io.admission import check_values
from deltaw.io.folder import Folder
from deltaw.io.formats import format as shared
from deltaw.io.formats.format import Format, Hints

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
"""Model type -> llama.cpp's name, of the models whose linear layers llama.cpp keeps as they are, but for the order of q
and k. Others (fused q, k and v taken apart, experts stacked) would be misread without a word, and are refused."""
PERMUTED = ("llama", "mistral")
"""Model types whose q and k rows llama.cpp reorders."""
NAMES = "deltaw.names"


class Gguf(Format):
    """GGUF LoRA files."""

    name: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".gguf" and path.is_file()

    def read(self, path: Path, hints: Hints) -> Adapter:
        gguf = library()
        Folder(path.parent).read(path.name)  # a plain file, and not a link
        try:
            reader = gguf.GGUFReader(path)
            facts = {name: reader.fields[name].contents() for name in reader.fields}
        except Exception as error:
            raise AdapterError(f"{path} is no GGUF file: {error}") from error
        if facts.get("general.type") != "adapter" or facts.get("adapter.type") != "lora":
            raise AdapterError(f"{path} is no LoRA adapter (general.type is {facts.get('general.type')!r})")
        alpha = facts.get("adapter.lora.alpha")
        tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
        if any(not t.is_floating_point() for t in tensors.values()) or not isinstance(alpha, float):
            raise AdapterError(f"{path}: quantised factors, or no alpha")
        check_values(tensors)
        own = facts.get(NAMES)
        if isinstance(own, str):
            known: Any = strict_json.parse(own.encode(), NAMES, 1 << 23)
        else:
            known = {v: [k, heads] for k, (v, heads) in names(hints).items()}
        changes = {}
        for name in sorted({t.rpartition(".")[0] for t in tensors}):
            if name not in known or f"{name}.lora_a" not in tensors or f"{name}.lora_b" not in tensors:
                raise AdapterError(f"{name!r} is no weight of this base, or half of its pair is missing")
            key, heads = known[name]
            A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            changes[str(key)] = shared.lora(A, interleaved(B, heads, back=True), alpha or float(A.shape[0]))
        odd = [t for t in tensors if not t.endswith((".lora_a", ".lora_b"))]
        if odd:
            raise AdapterError(f"{odd[0]!r} is no factor of a LoRA")
        return Adapter(changes)

    def cannot(self, adapter: Adapter) -> str | None:
        return shared.only(adapter, ("lora",), ("linear", "linear (own forward)"))

    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        gguf = library()
        known = names(hints)
        every = [(k, c, c.variant.scale * c.variant.rank) for k, c in adapter.changes.items()]  # type: ignore[attr-defined]
        alpha = max({a for _, _, a in every}, key=[a for _, _, a in every].count)
        writer = gguf.GGUFWriter(path, ARCHITECTURES[hints.base["model_type"]])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        alpha = float(np.float32(alpha))
        kept = {}
        for key, change, wanted in every:
            if key not in known:
                raise AdapterError(f"{key!r} has no name in llama.cpp's {hints.base['model_type']}")
            name, heads = known[key]
            kept[name] = [key, heads]
            B = interleaved(change.tensors["B"].float(), heads)
            B = B if wanted == alpha else (B.double() * (wanted / alpha)).float()
            writer.add_tensor(f"{name}.lora_a", change.tensors["A"].float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", B.contiguous().numpy())
        writer.add_string(NAMES, json.dumps(kept, sort_keys=True))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def library() -> Any:
    """The gguf package."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("GGUF files need the gguf package: pip install 'deltaw[gguf]'") from error
    return gguf


def names(hints: Hints) -> dict[str, tuple[str, int]]:
    """Parameter -> (llama.cpp's name, number of heads whose rows are reordered, or 0).

    Raises:
        AdapterError: the base is not given, or not one that llama.cpp reads by these rules.
    """
    gguf = library()
    base: Mapping[str, Any] = hints.base
    kind, blocks = base.get("model_type"), base.get("num_hidden_layers")
    architecture = ARCHITECTURES.get(str(kind))
    number = next((n for n, a in gguf.MODEL_ARCH_NAMES.items() if a == architecture), None)
    if not hints.shapes or not isinstance(blocks, int) or number is None:
        raise AdapterError(
            "GGUF has llama.cpp's names and order of the weights: give the base (--base), a model whose order is known "
            f"here ({', '.join(ARCHITECTURES)})" + (f"; found model_type {kind!r}" if kind else "")
        )
    table = gguf.get_tensor_name_map(number, blocks)
    heads = int(base.get("num_attention_heads") or 0)
    grouped = int(base.get("num_key_value_heads") or heads)
    found = {}
    for key in hints.shapes:
        name = table.get_name(key, try_suffixes=(".weight",))
        if name is not None:
            rows = 0
            if kind in PERMUTED:
                rows = heads if key.endswith("q_proj.weight") else grouped if key.endswith("k_proj.weight") else 0
            found[key] = (name if name.endswith(".weight") else f"{name}.weight", rows)
    return found


def interleaved(B: Tensor, heads: int, back: bool = False) -> Tensor:
    """B (out, r) with the rows of every head reordered: the two halves interleaved, or with `back` taken apart again."""
    if not heads:
        return B
    half = B.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return B.reshape(shape).transpose(1, 2).reshape(B.shape)


FORMAT = Gguf()
