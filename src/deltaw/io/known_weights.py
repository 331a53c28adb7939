"""What is known of a model's weights: every weight is hashed once, and again only when it may have changed.

In memory, per model: the entry of a weight counts as long as the weight is the same tensor object, at the same address, of
the same version (PyTorch counts every write), shape and dtype, and 16 of its values, read at every look, are the same bits.
So a write through `.data`, which PyTorch does not count, is found if it touches one of those (an optimizer's or a copy's
does); single values written in this way are not. Where nothing at all of a base changed since the last look (the same
names, tensors, versions, addresses, samples), one pass over its tensors says so (`unchanged`).

On disk (`cache_folder`), for large models: what follows from the weights but costs more than their sha256 (the hashes of
the 16-bit roundings, the sketch), under the sha256 of everything. The weights themselves are always hashed, so what a file
or a name says is never trusted; a damaged or foreign cache file counts as none.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError, ModelError
from deltaw.io import strict_json
from deltaw.io.base_walk import PLAIN, Inventory, Kept, kept_weights
from deltaw.io.sketch import sketch
from deltaw.io.tensor_file import NAMES, content

SAMPLES = 16
LARGE = 64 << 20
"""Bytes of weights from which on the cache on disk is used, and hashing is spread over threads."""
MAX_CACHED = 64 << 20
CACHED_FILES = 64

Place = tuple[tuple[int], tuple[int]] | None
"""Size and stride of up to 16 evenly spaced values of a tensor that lies in memory as one piece; None for another one."""


@dataclass
class Known:
    """One weight. brief: {"dtype", "shape", "form"?, "sha256"}; None if it holds no real numbers. full: the whole entry, once asked for.

    original: the full entry from before the weight was quantised, if it was known then.
    """

    refs: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    sample: bytes
    brief: dict[str, Any] | None = None
    full: dict[str, Any] | None = None
    original: dict[str, Any] | None = None


@dataclass
class Look:
    """A base whose every weight is simply there and known. refs, states: of all that it stores, by name.

    passing: paths of layers -> buffers there that no file keeps. spots: where values of `known` are read, by its order.
    values: what was there. agreed: the recorded entries that were last found to be those of `known`.
    """

    refs: dict[str, weakref.ref[Tensor]]
    states: list[tuple[Any, ...]]
    passing: dict[str, frozenset[str]]
    spots: list[list[tuple[int, Place]]]
    values: list[bytes]
    known: dict[str, Known]
    agreed: dict[str, Any] = field(default_factory=dict)


_seen: weakref.WeakKeyDictionary[nn.Module, dict[str, Known]] = weakref.WeakKeyDictionary()
_looks: weakref.WeakKeyDictionary[nn.Module, Look] = weakref.WeakKeyDictionary()


def unchanged(base: Inventory) -> Look | None:
    """The last look at the base, if nothing in it changed since then; else None. Found out once for each walk."""
    if "unchanged" not in base.answers:
        base.answers["unchanged"] = _unchanged(base)
    found: Look | None = base.answers["unchanged"]
    return found


def _unchanged(base: Inventory) -> Look | None:
    look = _looks.get(base.model)
    if look is None or look.refs.keys() != base.stored.keys():
        return None
    for name, tensor in base.stored.items():
        if look.refs[name]() is not tensor:
            return None
    if list(map(lying, base.stored.values())) != look.states or passing(base) != look.passing:
        return None
    weights = [base.stored[n] for n in look.known]
    return look if [together(views_at(weights, g)) for g in look.spots] == look.values else None


def remember(base: Inventory, found: Mapping[str, tuple[Kept, Known]]) -> None:
    """Keep what a look at all weights found, if each is a tensor of the base itself (none merged or in another form)."""
    _looks.pop(base.model, None)
    if any(t.is_inference() or type(t) not in PLAIN for t in base.stored.values()):
        return
    refs = {name: weakref.ref(tensor) for name, tensor in base.stored.items()}
    states = list(map(lying, base.stored.values()))
    for name, (weight, entry) in found.items():
        if weight.tensors[0] is not base.stored.get(name) or state_of(weight) != entry.state:
            return
    known = {name: known for name, (_, known) in found.items()}
    weights = [base.stored[name] for name in known]
    groups = spots(weights)
    values = [together(views_at(weights, group)) for group in groups]
    _looks[base.model] = Look(refs, states, passing(base), groups, values, known)


def passing(base: Inventory) -> dict[str, frozenset[str]]:
    """`Look.passing` of a base."""
    return {
        p: frozenset(m._non_persistent_buffers_set) for p, m in base.modules.items() if m._non_persistent_buffers_set
    }


def looked_at(model: nn.Module, without: Collection[str] = ()) -> dict[str, tuple[Kept, Known]]:
    """Name -> (weight, what is known of it) for every base weight of real numbers, hashed where it is new.

    Raises:
        ModelError: a weight is on the meta device, or adapters were merged for good.
    """
    cache = _seen.setdefault(model, {})
    weights = [w for w in kept_weights(model) if w.name not in without]
    found: dict[str, tuple[Kept, Known]] = {}
    new: list[tuple[Kept, Known]] = []
    for weight, sample in zip(weights, samples([t for w in weights for t in w.tensors[:1]])):
        if weight.tensors[0].is_meta:
            raise ModelError(f"{weight.name!r} is on the meta device: a fingerprint needs the weights")
        known, state = cache.get(weight.name), state_of(weight)
        if known is None or known.state != state or known.sample != sample or not same_objects(known, weight):
            was = None if known is None else known.full if known.original is None else known.original
            refs = tuple(weakref.ref(t) for t in weight.tensors)
            known = Known(refs, state, sample, original=was if weight.form != "dense" else None)
            new.append((weight, known))
        found[weight.name] = weight, known
    for (weight, known), brief in zip(new, spread(brief_of, [w for w, _ in new])):
        known.brief = brief
        if state_of(weight) == known.state and not any(t.is_inference() for t in weight.tensors):
            cache[weight.name] = known
    return {name: pair for name, pair in found.items() if pair[1].brief is not None}


def state_of(weight: Kept) -> tuple[Any, ...]:
    """What changes when a weight is written to, moved or replaced."""
    return weight.form, weight.dtype, [seen_as(t) for t in weight.tensors]


def seen_as(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is written to or given other memory, or another order of the same."""
    if tensor.is_inference():
        return tensor.data_ptr(), 0, tensor.shape, tensor.stride(), tensor.dtype
    return lying(tensor)


def lying(tensor: Tensor) -> tuple[Any, ...]:
    """The same of a tensor that counts its versions."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


def same_objects(known: Known, weight: Kept) -> bool:
    """Whether the tensors are the very ones that were hashed: an address may be used again."""
    for ref, tensor in zip(known.refs, weight.tensors):
        if ref() is not tensor:
            return False
    return len(known.refs) == len(weight.tensors)


def samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """The bytes of up to 16 evenly spaced values of each tensor, read together per device and dtype."""
    found = [b""] * len(tensors)
    for group in spots(tensors):
        views = views_at(tensors, group)
        raw, at = together(views), 0
        width = len(raw) // sum(view.shape[0] for view in views)
        for (i, _), view in zip(group, views):
            end = at + width * view.shape[0]
            found[i] = raw[at:end]
            at = end
    return found


def spots(tensors: Sequence[Tensor]) -> list[list[tuple[int, Place]]]:
    """Where `samples` reads: (index, place) of each tensor that holds values, one list per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Place]]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() and not tensor.is_meta:
            one_piece = type(tensor) in PLAIN and tensor.is_contiguous()
            groups.setdefault((tensor.device, tensor.dtype), []).append((i, place_in(tensor) if one_piece else None))
    return list(groups.values())


def place_in(tensor: Tensor) -> Place:
    """Up to 16 values, evenly spaced."""
    count = tensor.numel()
    return ((count,), (1,)) if count < SAMPLES else ((SAMPLES,), (count // SAMPLES,))


@torch.no_grad()
def views_at(tensors: Sequence[Tensor], group: Sequence[tuple[int, Place]]) -> list[Tensor]:
    """The values at these spots, (up to 16,) of each tensor."""
    return [tensors[i].as_strided(*at) if at is not None else scattered(tensors[i]) for i, at in group]


def scattered(tensor: Tensor) -> Tensor:
    """The same of a tensor that does not lie in memory as one piece, or that another library keeps in a form of its own."""
    tensor = tensor if type(tensor) in PLAIN else tensor.data
    count = tensor.numel()
    return tensor.reshape(-1)[:: max(1, count // SAMPLES)][: min(count, SAMPLES)]


def together(views: Sequence[Tensor]) -> bytes:
    """The bytes of all of them."""
    return torch.cat(list(views)).cpu().view(torch.uint8).numpy().tobytes()


def spread(work: Any, weights: Sequence[Kept]) -> Iterable[Any]:
    """`work(weight)` for each, on several threads if they are large (hashing runs outside of Python's lock)."""
    size = sum(t.numel() * t.element_size() for w in weights for t in w.tensors)
    threads = min(4, os.cpu_count() or 1)
    if size < LARGE or threads == 1:
        return [work(w) for w in weights]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, weights))


def brief_of(weight: Kept) -> dict[str, Any] | None:
    """{"dtype", "shape", "form"?, "sha256"} of the weight that is stood for; None for whole numbers."""
    tensor = weight.dense()
    if tensor is None or not tensor.is_floating_point():
        return None
    found: dict[str, Any] = {"dtype": NAMES.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape)}
    if weight.form != "dense":
        found["form"] = weight.form
    found["sha256"] = sha(tensor)
    return found


def completed(weight: Kept, known: Known) -> dict[str, Any]:
    """The full entry of a weight, made at the first call: its `brief` and what follows from the values."""
    if known.full is None:
        tensor = weight.dense()
        assert tensor is not None
        assert known.brief is not None
        known.full = {**known.brief, **derived(tensor, weight.form)}
    return known.full


def entry_now(weight: Kept) -> dict[str, Any] | None:
    """The full entry of a weight that is not remembered; None for whole numbers."""
    brief, tensor = brief_of(weight), weight.dense()
    return None if brief is None or tensor is None else {**brief, **derived(tensor, weight.form)}


def derived(tensor: Tensor, form: str = "dense") -> dict[str, Any]:
    """The hashes of an fp32 weight's 16-bit roundings, and the sketch."""
    found: dict[str, Any] = {}
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


# ---- on disk


def complete_all(found: Mapping[str, tuple[Kept, Known]]) -> dict[str, dict[str, Any]]:
    """The full entries of all weights; those of a large model are taken from the cache on disk, or kept there."""
    missing = {name: pair for name, pair in found.items() if pair[1].full is None}
    size = sum(t.numel() * t.element_size() for weight, _ in missing.values() for t in weight.tensors)
    key = ""
    if size >= LARGE:
        key = key_of([known.brief for _, known in missing.values()])
        stored = from_disk(key)
        for _, known in missing.values():
            assert known.brief is not None
            more = stored.get(name_of(known.brief))
            if more is not None:
                known.full = {**known.brief, **more}
    left = [pair for pair in missing.values() if pair[1].full is None]
    if left:
        by_weight = {id(weight): known for weight, known in left}
        for _ in spread(lambda w: completed(w, by_weight[id(w)]), [weight for weight, _ in left]):
            pass
        if key:
            to_disk(key, [known for _, known in missing.values()])
    return {name: completed(*pair) for name, pair in found.items()}


def cache_folder() -> Path:
    """`$DELTAW_CACHE`, else `deltaw` in `$XDG_CACHE_HOME`, else `~/.cache/deltaw`."""
    own = os.environ.get("DELTAW_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaw"


def name_of(brief: Mapping[str, Any]) -> str:
    """One text for what decides the derived values: form, dtype, shape, content."""
    shape = "x".join(map(str, brief["shape"]))
    return f"{brief.get('form', 'dense')} {brief['dtype']} {shape} {brief['sha256']}"


def key_of(briefs: Iterable[Mapping[str, Any] | None]) -> str:
    """The name of the cache file for these weights."""
    return hashlib.sha256("\n".join(sorted(name_of(b) for b in briefs if b)).encode()).hexdigest()


def from_disk(key: str) -> dict[str, dict[str, Any]]:
    """name_of(weight) -> derived values, as kept; empty if there is no sound file of that key."""
    try:
        path = cache_folder() / "fingerprints" / f"{key}.json"
        if path.stat().st_size > MAX_CACHED:
            return {}
        body = strict_json.parse(path.read_bytes(), "the cache", MAX_CACHED)
    except (OSError, RuntimeError, AdapterError):
        return {}
    entries = body.get("entries")
    if (
        not isinstance(entries, dict)
        or body.get("sha256") != hashlib.sha256(strict_json.canonical(entries)).hexdigest()
    ):
        return {}
    return entries


def to_disk(key: str, known: Iterable[Known]) -> None:
    """Keep derived values for the next process. A cache that cannot be written is no error."""
    entries = {
        name_of(k.brief): {f: v for f, v in k.full.items() if f not in k.brief}
        for k in known
        if k.brief is not None and k.full is not None
    }
    body = {"entries": entries, "sha256": hashlib.sha256(strict_json.canonical(entries)).hexdigest()}
    try:
        folder = cache_folder() / "fingerprints"
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{key}.{secrets.token_hex(4)}"
        draft.write_bytes(strict_json.canonical(body))
        os.replace(draft, folder / f"{key}.json")
        kept = sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for old in kept[:-CACHED_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return
