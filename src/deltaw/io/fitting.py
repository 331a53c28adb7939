"""What a PEFT folder and a model have to say to each other.

Is every module that the config targets filled, and every module to save? (For what is said in writing, see wording.py.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change, join_key, split_key
from deltaw.core.base_weights import base_weight
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io import fingerprint as prints
from deltaw.io.base_walk import Inventory
from deltaw.io.peft.claims import Claims
from deltaw.io.wording import declares_ties
from deltaw.model.targeting import host_for_parameter

OTHER = ("full", "rows", "diff")
"""Kinds of changes that the config accounts for in other ways than by its targets."""
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
TIED_BY_PEFT = ("embed_tokens", "lm_head")
"""Names of the layers that PEFT keeps tied on request, where the model declares them tied."""


def check_fit(base: Inventory, adapter: Adapter, claims: Claims, ours: bool = False) -> None:
    """Refuse a file whose config accounts for modules or parameters of this model for which it has no tensors.

    ours: deltaw wrote it, so that it is whole, and may say `bias` of a few biases, for which PEFT has no word.

    Raises:
        AdapterError: naming them.
    """
    check_names(base, adapter)
    have = {split_key(key)[0] for key in adapter.changes}
    modules = base.modules
    empty = [
        path
        for path, module in modules.items()
        if path and path not in have and _adaptable(module) and claims.targets(path)
    ]
    if empty:
        raise AdapterError(
            f"the config targets {len(empty)} modules of {type(base.model).__name__} for which the file has no tensors "
            f"({', '.join(empty[:4])}{' ...' if len(empty) > 4 else ''}): the file is incomplete, or for another model"
        )
    odd = [
        key
        for key, change in adapter.changes.items()
        if change.variant.kind not in OTHER and not within(key, base, claims)
    ]
    if odd:
        field, value = claims.left_out_by(split_key(odd[0])[0]) or ("target_modules", claims.target_modules)
        raise AdapterError(
            f"the file holds tensors for {odd[0]!r}{' and others' if len(odd) > 1 else ''}, which its config does not target "
            f"({field} is {str(value)[:80]}): PEFT would leave them out without a word. If they are meant, change {field}"
        )
    missing = [key for key in dict.fromkeys(said(base, adapter, claims, ours)) if key not in adapter.changes]
    if missing:
        lost = claims.bias == "lora_only" and all(split_key(key)[1] == "bias" for key in missing)
        raise AdapterError(
            f"the config says of {len(missing)} parameters of {type(base.model).__name__} that they are adapted, or trained in "
            f"full, for which the file has no tensors ({', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}): the file "
            f"is incomplete, or for another model"
            + (
                ". Older PEFT lost such biases when it saved: to load the rest, set bias to none in the config"
                if lost
                else ""
            )
        )


def said(base: Inventory, adapter: Adapter, claims: Claims, ours: bool) -> Iterator[str]:
    """The parameters that the config names one by one, by their modules to save, as biases, or as tied to a changed one."""
    if not (claims.expected or claims.parameters or claims.bias != "none" or claims.ties):
        return
    low = {split_key(key)[0] for key, change in adapter.changes.items() if change.variant.kind not in OTHER}
    for path, module in base.modules.items():
        saved = claims.saves(path)
        biased = not ours and (claims.bias == "all" or (claims.bias == "lora_only" and path in low))
        for site, parameter in module._parameters.items():
            key = join_key(path, site)
            raw = path and claims.names(key) and not claims.targets(path)
            if parameter is not None and (saved or raw or (biased and site == "bias")):
                yield key
    if claims.ties and declares_ties(base.model):
        ends = [key for key in base.stored if split_key(key)[0].rpartition(".")[2] in TIED_BY_PEFT]
        changed = {
            id(base.stored[k]) for k in ends if k in adapter.changes and adapter.changes[k].variant.kind != "rows"
        }
        yield from (key for key in ends if id(base.stored[key]) in changed)


def within(key: str, base: Inventory, claims: Claims) -> bool:
    """Whether the config of a file accounts for a change of `key`; PEFT adapts an attention's `out_proj` with it, and on
    request the layers that share a targeted parameter."""
    path, site = split_key(key)
    module, outer = base.modules.get(path), path.removesuffix(".out_proj")
    if module is None or not _adaptable(module) or claims.adapts(key):
        return True
    if claims.ties:
        mine = base.stored.get(key)
        if any(tensor is mine and claims.adapts(name) for name, tensor in base.stored.items()):
            return True
    return isinstance(base.modules.get(outer), nn.MultiheadAttention) and claims.adapts(join_key(outer, site))


def check_names(base: Inventory, adapter: Adapter) -> None:
    """Refuse an adapter whose parameters are all there under another beginning, and say which.

    Raises:
        AdapterError: with the `rename` that would help. Single names that are missing are left to `install`.
    """
    wanted = [key.partition("[")[0] for key in adapter.changes]
    have = base.stored
    if not wanted or any(key in have for key in wanted):
        return
    beginnings = [path for path in base.modules if path]
    for new in beginnings:
        if all(f"{new}.{key}" in have for key in wanted):
            raise AdapterError(_called_otherwise(base.model, wanted[0], {"": new}))
    first = wanted[0].split(".")
    for n in range(1, len(first)):
        old = ".".join(first[:n])
        rest = [key.removeprefix(f"{old}.") for key in wanted]
        if any(key == r for key, r in zip(wanted, rest)):
            break
        for new in ("", *beginnings):
            if all(join_key(new, r) in have for r in rest):
                raise AdapterError(_called_otherwise(base.model, wanted[0], {old: new}))


def _called_otherwise(model: nn.Module, key: str, rename: dict[str, str]) -> str:
    return (
        f"{key!r} and the adapter's other parameters are not in {type(model).__name__} under these names, but under "
        f"another beginning. If this is the base it was trained on, pass rename={rename}"
    )


def check_dtypes(base: Inventory, adapter: Adapter) -> None:
    """Refuse whole numbers where the model has real ones, and the other way round.

    Raises:
        AdapterError: naming the tensor.
    """
    own = base.stored
    for key, change in adapter.changes.items():
        real = not change.variant.any_shape or key not in own or own[key].is_floating_point()
        for name, tensor in change.tensors.items():
            if tensor.is_floating_point() != real and not (change.variant.any_shape and key not in own):
                raise AdapterError(f"{key}.{name} is {tensor.dtype}, which does not suit a parameter of real numbers")


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, ADAPTABLE) or type(module).__name__ == "Conv1D"


def folded(model: nn.Module, adapter: Adapter, copies: Mapping[str, Tensor]) -> tuple[Adapter, list[str]]:
    """`adapter` where the file carries frozen base weights along (PEFT does for targeted embeddings).

    If they are the model's own, nothing changes. If not (a resized vocabulary, a trained embedding), the change and the
    file's weight are folded into one full copy, which gives what PEFT gives.
    """
    notes: list[str] = []
    changes = dict(adapter.changes)
    for key, copy in copies.items():
        path, site = split_key(key)
        try:
            own = model.get_submodule(path).get_parameter(site)
        except AttributeError:
            continue  # install names it
        if prints.judge(prints.entry_of(copy), prints.entry_of(own))[:1] != "!":
            continue
        change = changes.get(key)
        if change is None:
            raise AdapterError(f"{key!r}: the file carries a base weight for a layer that it does not change")
        matrix = base_weight({key: copy}, key, change)
        new = (matrix.double() + change.delta_weight(matrix.double()).double()).to(copy.dtype)
        stored = new.T.contiguous() if new.shape != copy.shape else new
        changes[key] = Change(variants["full"](), {"value": stored.reshape(copy.shape)}, None, tuple(copy.shape))
        notes.append(
            f"the file carries its own {key!r}, which is not this model's: its low-rank change was folded into that weight"
        )
    return (adapter.replace(changes=changes) if notes else adapter), notes


def turned(base: Inventory, adapter: Adapter) -> Adapter:
    """PEFT's raw parameters change as they are stored; where a layer's matrix is the transpose, (BA)ᵀ = AᵀBᵀ."""
    changes = dict(adapter.changes)
    for key, change in adapter.changes.items():
        path, site = split_key(key)
        if change.layer != "module" or path not in base.modules or change.tensors.keys() != {"A", "B"}:
            continue
        A, B = change.tensors["A"], change.tensors["B"]
        host = host_for_parameter(base.modules[path], site)
        probe = torch.empty(2, 3, device="meta")
        if A.ndim == 2 and host is not None and host.to_matrix(base.modules[path], site, probe).shape != probe.shape:  # type: ignore[arg-type]
            changes[key] = replace(change, tensors={"A": B.T.contiguous(), "B": A.T.contiguous()}, layer=None)
    return adapter.replace(changes=changes)


def tie_rows(base: Inventory, adapter: Adapter) -> Adapter:
    """Trainable tokens of a tied embedding reach the head too, in PEFT as here (where the model says what it ties).

    An adapter that records a base's fingerprint was saved from a model here, and says itself what is tied.
    """
    if "fingerprint" in adapter.base:
        return adapter
    if not declares_ties(base.model) or not any(c.variant.kind == "rows" for c in adapter.changes.values()):
        return adapter
    names: dict[int, list[str]] = {}
    for name, tensor in base.stored.items():
        names.setdefault(id(tensor), []).append(name)
    changes = dict(adapter.changes)
    for same in names.values():
        for key in same:
            if key in changes and changes[key].variant.kind == "rows":
                others = tuple(n for n in same if n != key and n not in changes)
                changes[key] = replace(changes[key], tied=others)
    return adapter.replace(changes=changes)


def tie_equal(base: Inventory, adapter: Adapter) -> Adapter:
    """Equal changes of layers that share a parameter, as `ensure_weight_tying` makes PEFT write them, as the one that it is."""
    owners: dict[int, str] = {}
    changes = dict(adapter.changes)
    for key in [key for key in base.stored if key in changes]:
        owner = owners.setdefault(id(base.stored[key]), key)
        if owner != key and same_change(changes[owner], changes[key]):
            changes[owner] = replace(changes[owner], tied=(*changes[owner].tied, key))
            del changes[key]
    return adapter.replace(changes=changes)


def same_change(one: Change, other: Change) -> bool:
    """Whether two changes of one parameter are equal, also where one layer's matrix is the other's transpose."""
    mine, theirs = one.tensors, other.tensors
    dtypes = {tensor.dtype for tensor in (*mine.values(), *theirs.values())}
    if one.variant != other.variant or mine.keys() != theirs.keys() or len(dtypes) > 1:
        return False
    if all(torch.equal(mine[name], theirs[name]) for name in mine):
        return True
    return (
        mine.keys() == {"A", "B"} and torch.equal(mine["A"], theirs["B"].mT) and torch.equal(mine["B"], theirs["A"].mT)
    )
