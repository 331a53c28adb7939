"""diffusers: PEFT's tensor names below a pipeline part ("unet.", "transformer.", "text_encoder."), the config in the metadata.

Metadata `lora_adapter_metadata` holds PEFT's config, its fields prefixed in the same way. Files without it have `.alpha`
tensors, or scale 1 (alpha = rank), also where ranks differ. ai-toolkit's files are of that kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Adapter, Change
from deltaw.errors import AdapterError
from deltaw.io import strict_json
from deltaw.io.formats import format as shared
from deltaw.io.formats.format import Format, Hints
from deltaw.io.peft import grammar_for
from deltaw.io.peft.grammar import PREFIX

PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
METADATA = "lora_adapter_metadata"
OLD = {
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
}


class Diffusers(Format):
    """`pytorch_lora_weights.safetensors`."""

    name: ClassVar[str] = "diffusers"
    suffix: ClassVar[str] = ".safetensors"

    def recognises(self, path: Path) -> bool:
        names = shared.names_in(path) - {"__metadata__"}
        return bool(names) and all(n.partition(".")[0] in PARTS for n in names)

    def read(self, path: Path, hints: Hints) -> Adapter:
        tensors, metadata = shared.open_tensors(path)
        parts = sorted({n.partition(".")[0] for n in tensors})
        if METADATA in metadata and not any(p in PARTS for p in parts):  # of one model, as `save_lora_adapter` writes
            config = {**strict_json.parse(metadata[METADATA].encode(), METADATA, 1 << 20)}
            config["peft_type"] = config.get("peft_type") or "LORA"
            return grammar_for(config).read(config, {PREFIX + n: t for n, t in tensors.items()}, hints.shapes).adapter
        if any(p not in PARTS for p in parts):
            raise AdapterError(f"tensors of diffusers start with {', '.join(PARTS)}; found {parts[0]!r}")
        part = hints.component or (parts[0] if len(parts) == 1 else None)
        if part is None or part not in parts:
            raise AdapterError(
                f"the file adapts {', '.join(parts)}: choose one (--component), since each is a model of its own"
            )
        mine = {n.removeprefix(part + "."): t for n, t in tensors.items() if n.startswith(part + ".")}
        if METADATA in metadata:
            every = strict_json.parse(metadata[METADATA].encode(), METADATA, 1 << 20)
            config = {k.removeprefix(part + "."): v for k, v in every.items() if k.startswith(part + ".")}
            if config:
                config = {**config, "peft_type": config.get("peft_type") or "LORA"}
                found = grammar_for(config).read(config, {PREFIX + n: t for n, t in mine.items()}, hints.shapes).adapter
                return found.replace(extra={**found.extra, "component": part})
        return Adapter(by_pairs(mine), extra={"component": part})

    def cannot(self, adapter: Adapter) -> str | None:
        reason = shared.only(adapter, ("lora", "dora"), (*shared.LINEAR, *shared.CONVOLUTIONS))
        return reason or grammar_for({"peft_type": "LORA"}).cannot(adapter)

    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        part = hints.component or str(adapter.extra.get("component", "unet"))
        config, tensors = grammar_for({"peft_type": "LORA"}).write(adapter, hints.shapes)
        named = {f"{part}.{name.removeprefix(PREFIX)}": t for name, t in tensors.items()}
        packed = json.dumps({f"{part}.{k}": v for k, v in config.items()}, sort_keys=True)
        with path.open("wb") as stream:
            shared.write_tensors(stream, named, {"format": "pt", METADATA: packed})


def by_pairs(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Changes of a file without a config.

    Raises:
        AdapterError: a pair is incomplete, or a tensor is of no pair.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for old, new in OLD.items():
            name = name.removesuffix("." + old) + "." + new if name.endswith("." + old) else name
        for part in ("lora_A.weight", "lora_B.weight", "alpha", "lora_magnitude_vector"):
            if name.endswith("." + part):
                groups.setdefault(name.removesuffix("." + part), {})[part] = tensor
                break
        else:
            raise AdapterError(f"{name!r} is no tensor that diffusers would write")
    changes = {}
    for path, parts in groups.items():
        if "lora_A.weight" not in parts or "lora_B.weight" not in parts:
            raise AdapterError(f"{path!r}: one of lora_A and lora_B is missing")
        A, B = parts["lora_A.weight"], parts["lora_B.weight"]
        more: dict[str, Any] = {}
        if A.ndim > 2:
            more = {"layer": f"conv{A.ndim - 2}d", "shape": (B.shape[0], *A.shape[1:])}
        alpha: Any = parts.get("alpha", A.shape[0])
        m = parts.get("lora_magnitude_vector")
        changes[f"{path}.weight"] = shared.lora(A.flatten(1), B.flatten(1), float(alpha), m, **more)
    return changes


FORMAT = Diffusers()
