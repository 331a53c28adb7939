"""MLX (mlx-lm): a folder with `adapters.safetensors`, factors the other way round, and one rank and scale for all.

`lora_a` is (in, r), `lora_b` (r, out), DoRA's `m` (out,); the change is scale · (x a) b. The config's `keys` are names inside
the last `num_layers` blocks, or of whole paths: those are written, which say exactly what changes, in any blocks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Adapter, Change
from deltaw.errors import AdapterError
from deltaw.io import strict_json
from deltaw.io.folder import Folder
from deltaw.io.formats import format as shared
from deltaw.io.formats.format import Format, Hints

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


class Mlx(Format):
    """mlx-lm adapter folders."""

    name: ClassVar[str] = "mlx"
    suffix: ClassVar[str] = ""

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file()

    def read(self, path: Path, hints: Hints) -> Adapter:
        config = strict_json.parse(bytes(Folder(path).read(CONFIG, 1 << 20)), CONFIG, 1 << 20)
        tensors, _ = shared.open_tensors(path / WEIGHTS)
        options: Any = config.get("lora_parameters")
        kind = config.get("fine_tune_type", "lora")
        if (
            kind not in ("lora", "dora")
            or not isinstance(options, dict)
            or not isinstance(options.get("scale"), (int, float))
        ):
            raise AdapterError(f"fine_tune_type {kind!r} with lora_parameters {str(options)[:60]} cannot be read")
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if part not in ("lora_a", "lora_b", "m"):
                raise AdapterError(f"{name!r} is no tensor of an mlx-lm adapter")
            groups.setdefault(module, {})[part] = tensor
        changes = {}
        for module, parts in groups.items():
            wanted = {"lora_a", "lora_b", "m"} if kind == "dora" else {"lora_a", "lora_b"}
            if set(parts) != wanted:
                raise AdapterError(
                    f"{module!r} has {', '.join(sorted(parts))}; {kind} needs {', '.join(sorted(wanted))}"
                )
            A, B = parts["lora_a"].T, parts["lora_b"].T
            if A.ndim == 2 and options.get("rank") not in (None, A.shape[0]):
                raise AdapterError(f"{module!r} has rank {A.shape[0]}, the config says {options.get('rank')}")
            changes[f"{module}.weight"] = shared.lora(A, B, float(options["scale"]) * A.shape[0], parts.get("m"))
        return Adapter(changes)

    def cannot(self, adapter: Adapter) -> str | None:
        reason = shared.only(adapter, ("lora", "dora"), ("linear",))
        every: list[Any] = [c.variant for c in adapter.changes.values()]
        if reason is None and len({v.kind for v in every}) > 1:
            reason = "one file is either LoRA or DoRA"
        if reason is None and len({(v.rank, v.scale) for v in every}) > 1:
            reason = "one rank and one scale for all weights; `--uniform` pads and scales a LoRA to that"
        return reason

    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        path.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        change: Change | None = None
        for key, change in adapter.changes.items():
            module = shared.module_of(key)
            tensors |= {f"{module}.lora_a": change.tensors["A"].T, f"{module}.lora_b": change.tensors["B"].T}
            if "m" in change.tensors:
                tensors[f"{module}.m"] = change.tensors["m"]
        assert change is not None
        v: Any = change.variant
        paths = sorted(map(shared.module_of, adapter.changes))
        config = {
            "fine_tune_type": v.kind,
            "num_layers": -1,
            "lora_parameters": {"rank": v.rank, "scale": v.scale, "dropout": v.dropout, "keys": paths},
        }
        (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with (path / WEIGHTS).open("wb") as stream:
            shared.write_tensors(stream, tensors, {"format": "mlx"})


FORMAT = Mlx()
