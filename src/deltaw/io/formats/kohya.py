"""kohya's sd-scripts and LyCORIS: `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, every dot of a path an underscore.

So a path cannot be read back without the base's names: from our own files they come out of the metadata, else `--base`
gives them. Scale alpha/r with r from the tensor, alpha = r if it is missing. LyCORIS adds DoRA, LoHa, LoKr, dense
differences and Tucker cores (multiplied out here).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change, split_key
from deltaw.core.registry import variants
from deltaw.errors import AdapterError, DeltawError
from deltaw.io import strict_json
from deltaw.io.formats import format as shared
from deltaw.io.formats.format import Format, Hints
from deltaw.io.peft.per_module import tucker

COMPONENTS = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
}
PREFIXES = ("lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer", "lycoris")
NAMES = "deltaw_names"
PARTS = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "dora_scale",
    "alpha",
    "diff",
    "diff_b",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
]
KINDS = ("lora", "dora", "loha", "lokr", "diff")


class Kohya(Format):
    """kohya-ss and LyCORIS safetensors files."""

    name: ClassVar[str] = "kohya"
    suffix: ClassVar[str] = ".safetensors"

    def recognises(self, path: Path) -> bool:
        return any(n.startswith(PREFIXES) for n in shared.names_in(path))

    def read(self, path: Path, hints: Hints) -> Adapter:
        tensors, metadata = shared.open_tensors(path)
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            flat, _, part = key.partition(".")
            if part not in PARTS:
                raise AdapterError(f"{key!r} is no tensor that kohya or LyCORIS would write")
            groups.setdefault(flat, {})[part] = tensor
        known = names_of(groups, metadata, hints)
        changes: dict[str, Change] = {}
        for flat, parts in groups.items():
            try:
                changes |= read_module(known[flat], parts)
            except KeyError as error:
                raise AdapterError(f"{flat!r}: the tensor {error} is missing") from error
            except (DeltawError, ValueError, RuntimeError, IndexError) as error:
                raise AdapterError(f"{flat!r}: {error}") from error
        return Adapter(changes)

    def cannot(self, adapter: Adapter) -> str | None:
        reason = shared.only(adapter, KINDS, (*shared.LINEAR, *shared.CONVOLUTIONS, "module"))
        if reason:
            return reason
        for key, change in adapter.changes.items():
            site = split_key(key)[1]
            if site not in ("weight", "bias") or (site == "bias" and change.variant.kind != "diff"):
                return f"{key}: the format changes weights and biases of modules"
            if change.layer in shared.CONVOLUTIONS and change.shape is None:
                return f"{key}: the kernel's shape is not known"
        flat = [split_key(k)[0].replace(".", "_") for k in adapter.changes]
        if len(set(flat)) < len({split_key(k)[0] for k in adapter.changes}):
            return "two module paths become the same name when dots become underscores"
        return None

    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        names: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for key, change in adapter.changes.items():
            module, site = split_key(key)
            flat = flattened(module, hints.component)
            names[flat] = module
            for part, tensor in write_module(site, change).items():
                tensors[f"{flat}.{part}"] = tensor
        ranks = [c.variant.rank for c in adapter.changes.values() if hasattr(c.variant, "rank")]
        metadata = {"format": "pt", "ss_network_module": "networks.lora", NAMES: json.dumps(names, sort_keys=True)}
        if ranks:
            most = max(set(ranks), key=ranks.count)
            first: Any = next(c.variant for c in adapter.changes.values() if getattr(c.variant, "rank", 0) == most)
            metadata |= {"ss_network_dim": str(most), "ss_network_alpha": repr(first.scale * most)}
        with path.open("wb") as stream:
            shared.write_tensors(stream, tensors, metadata)


def flattened(path: str, component: str | None) -> str:
    """ "unet.down.0.to_q" -> "lora_unet_down_0_to_q". A path without a pipeline part gets that of `component`."""
    first, _, rest = path.partition(".")
    if first in COMPONENTS and rest:
        return f"{COMPONENTS[first]}_{rest.replace('.', '_')}"
    prefix = COMPONENTS.get(component or "unet", component or "lora_unet")
    return f"{prefix}_{path.replace('.', '_')}"


def names_of(groups: Mapping[str, Any], metadata: Mapping[str, str], hints: Hints) -> dict[str, str]:
    """Flat name -> module path, from the file's own metadata or the base's names.

    Raises:
        AdapterError: neither is there, a name fits no module, or more than one.
    """
    own: Any = {}
    if NAMES in metadata:
        own = strict_json.parse(metadata[NAMES].encode(), NAMES, 1 << 24)
    modules = sorted({split_key(k)[0] for k in hints.shapes or ()} - {""})
    found = {}
    for flat in groups:
        if isinstance(own.get(flat), str) and re.sub(r"^lora_[a-z0-9]+_", "", flat).endswith(
            own[flat].replace(".", "_")[-8:]
        ):
            found[flat] = own[flat]
            continue
        prefix = next((p for p in PREFIXES if flat.startswith(p + "_")), None)
        if prefix is None:
            raise AdapterError(f"{flat!r} starts with none of {', '.join(PREFIXES)}")
        rest = flat.removeprefix(prefix + "_")
        part = next((c for c, p in COMPONENTS.items() if p == prefix), None)
        hits = [m for m in modules if m.replace(".", "_") == rest or m.replace(".", "_") == f"{part}_{rest}"]
        if not modules:
            raise AdapterError(
                f"{flat!r} is a path whose dots were replaced by underscores: give the base, whose names undo that (--base)"
            )
        if len(hits) != 1:
            raise AdapterError(f"{flat!r} fits {len(hits)} modules of the base{': ' + ', '.join(hits) if hits else ''}")
        found[flat] = hits[0]
    return found


def read_module(path: str, parts: dict[str, Tensor]) -> dict[str, Change]:
    """Parameter -> change, of one module's tensors."""
    found: dict[str, Change] = {}
    full = variants["diff"]
    if "diff_b" in parts:
        bias = parts.pop("diff_b")
        found[f"{path}.bias"] = Change(full(), {"diff": bias}, None, tuple(bias.shape))
    if not parts:
        return found
    if "diff" in parts:
        weight = parts.pop("diff")
        change = Change(full(), {"diff": weight}, None, tuple(weight.shape))
    elif "hada_w1_a" in parts:
        change = loha(parts)
    elif any(p.startswith("lokr") for p in parts):
        change = lokr(parts)
    else:
        change = low_rank(parts)
    parts.pop("alpha", None)
    if parts:
        raise AdapterError(f"the tensors {', '.join(sorted(parts))} do not belong together with the others")
    found[f"{path}.weight"] = change
    return found


def low_rank(parts: dict[str, Tensor]) -> Change:
    """lora_down (r, in, *kernel), lora_up (out, r, 1 ...), with or without a core or dora_scale."""
    down, up = parts.pop("lora_down.weight"), parts.pop("lora_up.weight")
    alpha = float(parts.get("alpha", torch.tensor(float(down.shape[0]))))
    layer, shape = None, None
    mid = parts.pop("lora_mid.weight", None)
    if mid is not None:
        B, A = tucker(mid, up.flatten(1).T, down.flatten(1))
        layer, shape = f"conv{mid.ndim - 2}d", (up.shape[0], down.shape[1], *mid.shape[2:])
    else:
        A, B = down.flatten(1), up.flatten(1)
        if down.ndim > 2:
            layer, shape = f"conv{down.ndim - 2}d", (up.shape[0], *down.shape[1:])
    m = parts.pop("dora_scale", None)
    if m is not None and m.shape[0] != m.numel():
        raise AdapterError(f"dora_scale {tuple(m.shape)} scales inputs, not outputs, which DoRA here does not do")
    return shared.lora(A, B, alpha, m, layer=layer, shape=shape)


def loha(parts: dict[str, Tensor]) -> Change:
    """LyCORIS's LoHa."""
    found = {}
    for n in "12":
        b, a = parts.pop(f"hada_w{n}_a"), parts.pop(f"hada_w{n}_b")
        core = parts.pop(f"hada_t{n}", None)
        found[f"B{n}"], found[f"A{n}"] = (b, a) if core is None else tucker(core, b, a)
    rank = found["A1"].shape[0]
    change = Change(variants["loha"](rank=rank, alpha=float(parts.get("alpha", torch.tensor(float(rank))))), found)
    _ = change.matrix_shape
    return change


def lokr(parts: dict[str, Tensor]) -> Change:
    """LyCORIS's LoKr; two whole factors have scale 1, whatever alpha says."""
    found: dict[str, Tensor] = {}
    for side, n in (("C", "1"), ("D", "2")):
        if f"lokr_w{n}" in parts:
            found[side] = parts.pop(f"lokr_w{n}").flatten(1)
        else:
            left, right = parts.pop(f"lokr_w{n}_a"), parts.pop(f"lokr_w{n}_b")
            core = parts.pop("lokr_t2", None) if n == "2" else None
            found[f"{side}_left"], found[f"{side}_right"] = (left, right) if core is None else tucker(core, left, right)
    whole = "".join(s for s in "CD" if s in found)
    rank = next((t.shape[1] for k, t in found.items() if k.endswith("_left")), 1)
    alpha = float(rank) if whole == "CD" else float(parts.get("alpha", torch.tensor(float(rank))))
    C = found.get("C")
    split = C.shape if C is not None else (found["C_left"].shape[0], found["C_right"].shape[1])
    change = Change(variants["lokr"](rank=rank, alpha=alpha, split=tuple(split), whole=whole), found)
    _ = change.matrix_shape
    return change


def write_module(site: str, change: Change) -> dict[str, Tensor]:
    """Part -> tensor."""
    t, v = change.tensors, change.variant
    if v.kind == "diff":
        return {"diff" if site == "weight" else "diff_b": t["diff"]}
    alpha = shared.exactly(v.scale * v.rank)  # type: ignore[attr-defined]
    if v.kind == "loha":
        return {"hada_w1_a": t["B1"], "hada_w1_b": t["A1"], "hada_w2_a": t["B2"], "hada_w2_b": t["A2"], "alpha": alpha}
    if v.kind == "lokr":
        found = {"alpha": alpha}
        for name, tensor in t.items():
            n = "1" if name.startswith("C") else "2"
            found[f"lokr_w{n}" + {"": "", "left": "_a", "right": "_b"}[name[2:]]] = tensor
        if set(t) == {"C", "D"}:
            found["lokr_w1"] = found["lokr_w1"] * v.scale  # type: ignore[attr-defined]
        return found
    kernel = () if change.layer not in shared.CONVOLUTIONS or change.shape is None else change.shape[1:]
    down = t["A"].reshape(t["A"].shape[0], *kernel) if kernel else t["A"]
    ones = (1,) * max(0, len(kernel) - 1)
    found = {"lora_down.weight": down, "lora_up.weight": t["B"].reshape(*t["B"].shape, *ones), "alpha": alpha}
    if "m" in t:
        found["dora_scale"] = t["m"].reshape(-1, *(1,) * max(1, len(kernel)))
    return found


FORMAT = Kohya()
