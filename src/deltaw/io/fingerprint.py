"""Fingerprint of a base model: is this the very model that the adapter was trained on?

Per parameter (and float buffer) it keeps the sha256 of the exact bytes, for fp32 also those of its fp16 and bf16 roundings,
and a sketch: 8 seeded random projections. So "the same weights in fp16, bf16 or fp32" is decided exactly; a quantised form
is compared by the sketch, whose distance estimates the relative difference of the weights. Parameters that the adapter
replaces as a whole (a new classifier) are left out, and so are those of adapters.

Cost: one pass over the weights, kept per model; a parameter is read again only if it was written to (by its version and
address; writing through `.data` is found by a probe of 64 entries only).
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, join_key
from deltaw.core.host import CHILD, FORMS, Host, parameter_names
from deltaw.errors import ModelError
from deltaw.io.tensor_file import NAMES, content

VERSION = 1
PROJECTIONS = 8
CHUNK = 4096
SEED = b"deltaw fingerprint 1"
TOLERANCE = {"float": 0.01, "int8": 0.05, "other": 0.25}
"""Largest accepted sketch distance: between 16-bit roundings, to 8-bit and to other (4-bit) forms."""

OTHER = "!other values"

_seen: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, dict[str, Any], dict[str, Any] | None]]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Comparison:
    """What comparing a base with a fingerprint found.

    verified: every recorded parameter was compared. other: parameters that differ, with the reason; precision: those
    that are the same weights in another precision.
    """

    verified: bool
    other: Mapping[str, str]
    precision: Mapping[str, str]


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """{"version", "parameters": {name: {"dtype", "shape", "sha256", ..., "sketch"}}} of the base of `model`.

    Adapters are left out and merged changes are looked through. `without`: names to leave out.

    Raises:
        ModelError: the model is on the meta device, or merged for good (its base is gone).
    """
    earlier = {name: known[2] for name, known in _seen.get(model, {}).items() if known[2] is not None}
    return {"version": VERSION, "parameters": originals_of(dict(entries(model, without)), earlier)}


def originals_of(entries: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """`entries` with those of quantised weights replaced by what is known of the originals from before.

    earlier: entries of the same base, from a time when it was not quantised; only those count that still agree.
    """
    found = dict(entries)
    for name, entry in entries.items():
        before = (earlier or {}).get(name)
        if "form" not in entry or not isinstance(before, Mapping) or "form" in before:
            continue
        if before.get("shape") == entry["shape"] and distance(before.get("sketch"), entry["sketch"]) <= tolerance(
            entry
        ):
            found[name] = dict(before)
    return found


def tolerance(entry: Mapping[str, Any]) -> float:
    """How far a weight in this entry's form may be from its original."""
    form = entry.get("form", "dense")
    return TOLERANCE["float" if form == "dense" else "int8" if "8" in form else "other"]


def entries(
    model: nn.Module, without: Collection[str] = (), only: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, entry) of every base parameter, from the cache where it still holds."""
    cache = _seen.setdefault(model, {})
    for name, tensor, form in base_tensors(model):
        if name in without or (only is not None and name not in only):
            continue
        if tensor.is_meta:
            raise ModelError(f"{name!r} is on the meta device: a fingerprint needs the weights")
        state = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype, form, _probe(tensor))
        known = cache.get(name)
        if known is None or known[0] != state:
            before = None if known is None else known[1] if "form" not in known[1] else known[2]
            known = (state, entry_of(tensor, form), before if form != "dense" else None)
            cache[name] = known
        yield name, known[1]


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, form) of what the base keeps: parameters and persistent float buffers, each storage once.

    form is "dense", or how a quantised weight is kept; the tensor is then what it stands for.
    """
    seen: set[int] = set()
    originals: Mapping[str, Tensor] | None = None
    for path, module in own_modules(model):
        if isinstance(module, Host) and originals is None:
            originals = _originals(module)
        for site in parameter_names(module):
            held = module.form(site) if isinstance(module, Host) else None
            if held is not None and isinstance(module, Host):
                yield join_key(path, site), module.parameter(site).detach(), held.form.kind
        kept = {s: b for s, b in module._buffers.items() if s not in module._non_persistent_buffers_set}
        for site, tensor in [*module._parameters.items(), *kept.items()]:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            key = join_key(path, site)
            dense, form = _dense(module, site, (originals or {}).get(key, tensor))
            if dense.is_floating_point():
                yield key, dense.detach(), form


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base, each once, without the modules of adapters."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Host):
            for child in (CHILD, FORMS):
                held = module._modules.get(child)
                if held is not None:
                    inside.update(id(m) for m in held.modules())
        if id(module) not in inside:
            yield path, module


def _originals(host: Host) -> Mapping[str, Tensor]:
    merged = host.roster.merged
    if merged is None:
        return {}
    if getattr(merged, "final", False):
        raise ModelError("adapters were merged for good (keep=None): the base that a fingerprint would be of is gone")
    file = getattr(merged, "file", None)
    if file is not None:
        from safetensors.torch import load_file

        return dict(load_file(file))
    return dict(merged.originals)


def _dense(module: nn.Module, site: str, tensor: Tensor) -> tuple[Tensor, str]:
    """The weight that a stored tensor stands for, and the name of its form."""
    if type(tensor) in (Tensor, nn.Parameter, torch.nn.parameter.Buffer) and tensor.is_floating_point():
        return tensor, "dense"
    quantised = getattr(tensor, "dequantize", None)
    if tensor.is_floating_point() and callable(quantised) and type(tensor) not in (Tensor, nn.Parameter):
        return quantised(), type(tensor).__name__.lower()
    if isinstance(module, Host) and site == "weight":
        frozen = module.frozen(site)
        return frozen.dense(), type(frozen).__name__.lower()
    return tensor, "dense"


def entry_of(tensor: Tensor, form: str = "dense") -> dict[str, Any]:
    """The entry of one tensor."""
    found: dict[str, Any] = {"dtype": NAMES.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape)}
    if form != "dense":
        found["form"] = form
    found["sha256"] = sha(tensor)
    if tensor.dtype == torch.float32 and form == "dense":
        found["sha256_F16"] = sha(tensor.half())
        found["sha256_BF16"] = sha(tensor.bfloat16())
    found["sketch"] = [f"{v:.5e}" for v in sketch(tensor)]
    return found


def sha(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes; for dtypes that files do not know, of its fp32 values."""
    tensor = tensor if tensor.dtype in NAMES else tensor.float()
    digest = hashlib.sha256()
    for piece in content(tensor):
        digest.update(piece)
    return digest.hexdigest()


def sketch(tensor: Tensor) -> list[float]:
    """The norm and `PROJECTIONS` random projections of a tensor, each divided by the norm.

    The random signs are a product of one sign per chunk and one per place in a chunk, both from SHAKE-256, so that they
    are the same on every machine and cost no memory. Two tensors at relative distance d have sketches at about d.
    """
    flat = tensor.detach().reshape(-1).to("cpu", torch.float32)
    n = flat.numel()
    chunks = max(1, -(-n // CHUNK))
    outer, inner = signs(b"outer", chunks), signs(b"inner", CHUNK)
    sums = torch.zeros(PROJECTIONS, dtype=torch.float64)
    squares = 0.0
    for first in range(0, chunks, 256):
        part = flat[first * CHUNK : (first + 256) * CHUNK]
        if part.numel() % CHUNK:
            part = nn.functional.pad(part, (0, -part.numel() % CHUNK))
        part = part.view(-1, CHUNK)
        squares += float(torch.linalg.vector_norm(part, dim=1).double().square().sum())
        sums += ((part @ inner).double() * outer[first : first + part.shape[0]]).sum(0)
    norm = squares**0.5
    return [norm, *(sums / (norm or 1.0)).tolist()]


_signs: dict[tuple[bytes, int], Tensor] = {}


def signs(what: bytes, count: int) -> Tensor:
    """(count, PROJECTIONS) of ±1, the same everywhere."""
    size = 1 << (count - 1).bit_length()
    found = _signs.get((what, size))
    if found is None:
        bits = hashlib.shake_256(SEED + what).digest(size * PROJECTIONS // 8)
        table = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
        each = (table[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        found = each.reshape(size, PROJECTIONS).float() * 2 - 1
        if size <= 1 << 20:
            _signs[what, size] = found
    return found[:count]


def _probe(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return 0
    at = (
        torch.linspace(0, flat.numel() - 1, 64).long().clamp(max=flat.numel() - 1).to(flat.device)
    )  # fp32 rounds large counts up
    return hash(tuple(flat[at].float().tolist()))


def compare(model: nn.Module, recorded: Mapping[str, Any], without: Collection[str] = ()) -> Comparison:
    """Compare the base of `model` with a recorded fingerprint. `without`: names that need not agree."""
    there = recorded.get("parameters")
    if not isinstance(there, Mapping) or recorded.get("version") != VERSION or not there:
        return Comparison(False, {}, {})
    tensors = {name: (tensor, form) for name, tensor, form in base_tensors(model)}
    aliases = _aliases(model)
    other: dict[str, str] = {}
    precision: dict[str, str] = {}
    here = dict(entries(model, without))
    for name, entry in there.items():
        if name in without:
            continue
        canonical = str(aliases.get(name, name))
        found = here.get(name) or here.get(canonical)
        if found is None:
            other[name] = "missing in this model"
            continue
        tensor, form = tensors[name if name in tensors else canonical]
        verdict = judge(entry, found, tensor, form)
        if verdict.startswith("!"):
            other[name] = verdict[1:]
        elif verdict:
            precision[name] = verdict
    # fp32 read from a 16-bit file, or the other way round
    common = {n: e for n, e in here.items() if n in there and n not in without}
    if other and all(why == OTHER[1:] for why in other.values()) and set(other) <= set(common):
        short = rounding(there, common, {n: tensors[n][0] for n in common})
        if short is not None:
            return Comparison(True, {}, dict.fromkeys(other, f"{short} in F32"))
    for name in here:
        if name not in there and name not in without and aliases.get(name, name) not in there:
            other.setdefault(name, "not in the base that was trained on")
    return Comparison(True, other, precision)


def judge(recorded: Mapping[str, Any], found: Mapping[str, Any], tensor: Tensor, form: str) -> str:
    """ "" if equal, "fp32 -> fp16" and the like if equal up to precision, "!reason" if other."""
    if recorded.get("shape") != found["shape"]:
        return f"!shape {found['shape']}, trained on {recorded.get('shape')}"
    was, now = recorded.get("dtype"), found["dtype"]
    was_form = recorded.get("form", "dense")
    if was == now and recorded.get("sha256") == found["sha256"]:
        return ""
    if was_form == form == "dense":
        if was == now:
            return OTHER
        if recorded.get(f"sha256_{now}") == found["sha256"] is not None:
            return f"{was} -> {now}"
        if recorded.get("sha256") == found.get(f"sha256_{was}") is not None:
            return f"{was} -> {now}"
        if "F32" in (was, now) and {was, now} & {"F16", "BF16"}:
            return OTHER
    kinds = {was_form, form} - {"dense"}
    kind = "float" if not kinds else "int8" if all("8" in k for k in kinds) else "other"
    gap = distance(recorded.get("sketch"), found["sketch"])
    if gap <= TOLERANCE[kind]:
        return f"{was_form if was_form != 'dense' else was} -> {form if form != 'dense' else now}"
    return f"!other values (about {gap:.0%} apart)"


def rounding(there: Mapping[str, Any], here: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """ "F16" or "BF16" if one base is the other, read from a file of that precision, as a whole; else None.

    A single value moved by less than a rounding does not count as such: over half of the matrices must differ.
    """
    matrices = [n for n, entry in here.items() if len(entry["shape"]) > 1]
    moved = [n for n in matrices if there[n].get("sha256") != here[n]["sha256"]]
    if not moved or 2 * len(moved) <= len(matrices):
        return None
    for short in ("F16", "BF16"):
        field = f"sha256_{short}"
        if any(there[n].get(field) is None or there[n].get(field) != here[n].get(field) for n in here):
            continue
        short_now = {n: _round(tensors[n], short).float() for n in here}
        if all(torch.equal(short_now[n], tensors[n]) for n in here):
            return short
        if all(there[n].get("sha256") == sha(short_now[n]) for n in here):
            return short
    return None


def _round(tensor: Tensor, short: str) -> Tensor:
    return tensor.to({"F16": torch.float16, "BF16": torch.bfloat16}[short])


def distance(one: Any, other: Any) -> float:
    """About ‖W - V‖ / ‖W‖, from two sketches."""
    try:
        a, b = [float(v) for v in one], [float(v) for v in other]
    except (TypeError, ValueError):
        return float("inf")
    if len(a) != len(b) or len(a) != PROJECTIONS + 1:
        return float("inf")
    if a[0] == 0 or b[0] == 0:
        return 0.0 if a[0] == b[0] else float("inf")
    ratio = b[0] / a[0]
    squares = sum((x - y * ratio) ** 2 for x, y in zip(a[1:], b[1:])) / PROJECTIONS
    return float(max(squares**0.5, abs(ratio - 1)))


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a shared parameter -> the name under which it is kept."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[name] = first.setdefault(id(parameter), name)
    return found


def replaced(adapter: Adapter) -> set[str]:
    """Parameters that the adapter replaces as a whole: the base's values there do not matter."""
    return {key for key, change in adapter.changes.items() if change.variant.kind == "full"}
