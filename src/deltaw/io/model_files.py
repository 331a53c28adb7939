"""`save` and `load`: a model's adapter to a folder and back, checked against the model and its base weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from deltaw.core.adapter import ALIGNMENT, Adapter, split_key
from deltaw.errors import AdapterError, BaseMismatch, ConfigError, did_you_mean
from deltaw.io import fingerprint as prints
from deltaw.io import hub
from deltaw.io.admission import Admitted, Arriving, admitting, arriving, check_values
from deltaw.io.base_walk import Inventory, inventory
from deltaw.io.card import card as model_card
from deltaw.io.files import write_parts
from deltaw.io.fitting import (
    check_dtypes,
    check_fit,
    check_names,
    folded,
    tie_equal,
    tie_rows,
    turned,
)
from deltaw.io.folder import CONFIG, Folder
from deltaw.io.known_weights import unchanged
from deltaw.io.notices import AdapterNotice
from deltaw.io.peft.grammar import grammar_of, grammars
from deltaw.io.peft.older_names import incomplete, under_todays_names
from deltaw.io.starts import without_start
from deltaw.io.wording import cannot_place, task_of, tighten
from deltaw.model import state
from deltaw.model.attach import get, installed
from deltaw.model.changing import changing

Source = str | os.PathLike[str] | Folder | Adapter


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    push_to_hub: str | bool | None = None,
    *,
    grammar: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> Path:
    """Save the adapter `name` of `model` as the folder `path`, which PEFT reads where its grammar can say it.

    The manifest records the fingerprint of the base. Of a sharded model (FSDP2), every process must call it: the
    tensors are gathered, the first process writes, and all return when the folder is there.
    push_to_hub: a repository id (True: the folder's name) to upload to as well, with a model card; nothing is asked of a
    network otherwise.

    Raises:
        UnknownName: the model has no adapter of that name.
        NonFinite: a tensor holds NaN or infinity; nothing is written.
        AdapterError: the folder exists and is not an adapter of ours, or the grammar cannot say this adapter.
    """
    root = state.unwrap(model)
    adapter = in_order(described(root, get(root, name)), stored_shapes(root))
    check_values(adapter.tensors())
    misplaced = None if grammar else cannot_place(root, adapter)
    chosen = grammar_of(adapter, "DELTAW" if misplaced else grammar)
    if grammar is None and chosen.peft_type == "DELTAW":
        why = misplaced or own_words(adapter)
        warnings.warn(f"saved in deltaw's own words, which PEFT refuses: {why}", AdapterNotice, stacklevel=2)
    config, tensors = chosen.write(adapter, stored_shapes(root))
    if chosen.peft_type != "DELTAW":
        config = tighten(config, root)
    text = model_card(adapter, config) if push_to_hub else None
    sharded = state.is_sharded(root)
    if sharded and dist.get_rank() > 0:
        dist.barrier()
        return Path(path)
    try:
        folder = write_parts(adapter, config, tensors, path, text)
        if push_to_hub:
            hub.push(folder, folder.name if push_to_hub is True else push_to_hub, private=private, token=token)
    finally:
        if sharded:
            dist.barrier()
    return folder


def own_words(adapter: Adapter) -> str:
    """Why no grammar of PEFT says `adapter`: the reason of its own method's, else LoRA's."""
    reasons = {g.kinds[0]: f"{g.peft_type}: {g.cannot(adapter)}" for g in grammars() if g.peft_type != "DELTAW"}
    kinds = {c.variant.kind for c in adapter.changes.values()}
    return next((why for kind, why in reasons.items() if kind in kinds), reasons["lora"])


def in_order(adapter: Adapter, shapes: Mapping[str, Any]) -> Adapter:
    """The changes in the order in which the model registers its parameters."""
    place = {key: n for n, key in enumerate(shapes)}
    keys = sorted(adapter.changes, key=lambda k: (place.get(k.partition("[")[0], len(place)), k))
    return adapter.replace(changes={k: adapter.changes[k] for k in keys})


def described(model: nn.Module, adapter: Adapter) -> Adapter:
    """`adapter` with what is known of its base (name, fingerprint) and its task."""
    config = getattr(model, "config", None)
    base: dict[str, Any] = dict(adapter.base)
    named = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if isinstance(named, str) and named:
        base["name"] = named
    if not any(t.is_meta for t in adapter.tensors().values()):
        now = prints.fingerprint(model, prints.replaced(adapter))
        earlier = base.get("fingerprint")
        if isinstance(earlier, Mapping) and isinstance(earlier.get("parameters"), Mapping):
            now["parameters"] = prints.originals_of(now["parameters"], earlier["parameters"])
        base["fingerprint"] = now
    extra = dict(adapter.extra)
    task = task_of(model, adapter)
    extra.pop("task_type", None)
    if task is not None:
        extra["task_type"] = task
    labels = getattr(config, "id2label", None)
    if task == "SEQ_CLS" and isinstance(labels, Mapping):
        extra.setdefault("id2label", {str(k): str(v) for k, v in labels.items()})
    return adapter.replace(base=base, extra=extra)


def load(
    model: nn.Module,
    source: Source,
    name: str = "default",
    active: bool = True,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
    *,
    verify: bool = True,
    mapped: bool = False,
    rename: Mapping[str, str] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Give `model` the adapter in `source` under `name`, and return the model. Strict: it fits as a whole or not at all.

    source: a folder, a hub id ("user/repo", with `revision`), or an `Adapter`.
    active: it speaks from now on, alone. trainable: training goes on with it.
    allow_base_mismatch: accept a base with other weights than the one it was trained on.
    verify: False accepts files that were edited since deltaw wrote them.
    mapped: compute with the file's own pages instead of reading it into memory: they are shared by all processes that map
        it, and the system may drop them and fetch them again. For servers with many adapters. All checks stay, but they are
        made once: from then on nobody may write into the file or cut it (that changes the weights in use, or ends the
        process); `dw.save` over it is safe, as it puts a new file in its place. Not for training.
    rename: {old: new} beginnings of module paths, for a base whose modules have other names than they had in training.
    A `deltaw.io.AdapterNotice` (a warning) says when the base could not be verified, or has another precision.

    Raises:
        AdapterError: the file is damaged or foreign, a tensor or a target is left over, a shape differs.
        BaseMismatch: the base is not the one that it was trained on; the message names the weights.
        NonFinite: a tensor holds NaN or infinity.
        NameTaken, ModelError: the model is not in a state to take it.
        ConfigError: mapped=True, but it shall be trained, or it is no file.
    If anything is wrong, the model is left as it was.
    """
    if mapped and (trainable or isinstance(source, Adapter)):
        reason = "trainable=True trains a copy of its own" if trainable else "an Adapter is in memory already"
        raise ConfigError(f"mapped=True is for a folder that is served as it is; {reason}: leave mapped out")
    files = (
        None if isinstance(source, Adapter) else arriving(found(source, revision, token), verify=verify, mapped=mapped)
    )
    for note in taken(model, source, files, name, active, trainable, allow_base_mismatch, verify, rename):
        warnings.warn(note, AdapterNotice, stacklevel=2)
    return model


@changing
def taken(
    model: nn.Module,
    source: Source,
    files: Arriving | None,
    name: str,
    active: bool,
    trainable: bool,
    allow_base_mismatch: bool,
    verify: bool,
    rename: Mapping[str, str] | None,
) -> list[str]:
    """`load`, where the files are on their way; what should be said."""
    layout = state.Layout(model)
    if isinstance(source, Adapter):
        adapter, notes = of_value(layout, source if rename is None else moved(source, rename), allow_base_mismatch)
        adopt = False
    else:
        assert files is not None
        base = inventory(layout)
        unchanged(base)  # which takes as long as the file, and may be done before that is there
        with admitting(files, verify=verify, shapes=None if rename else base.shapes) as admitted:
            adapter, notes = fitted(base, renamed(admitted, rename) if rename else of_today(base, admitted))
            notes += checked_for(base, adapter, allow_base_mismatch)
            # base weights would stay in memory beside it; and who trains may resize, offload and share memory
            adopt = not trainable and not admitted.parsed.base_copies
    adopted = installed(layout, adapter, name, active=active, trainable=trainable, adopt=adopt)
    if files is not None and files.mapped and not adopted:
        notes.append(
            "mapped=True, but its tensors were copied: the model does not compute with them as they lie in the file (another "
            f"precision or device, one tensor in several layers, or not all at a multiple of {ALIGNMENT} bytes, where dw.save puts "
            "those whose sizes allow it)"
        )
    return notes


def of_value(layout: state.Layout, adapter: Adapter, allow_base_mismatch: bool) -> tuple[Adapter, list[str]]:
    """An adapter that comes as a value, as the model of `layout` takes it, checked as a file is; what should be said."""
    base = inventory(layout)
    check_values(adapter.tensors())
    adapter, _, notes = under_todays_names(layout.root, adapter, base.stored)
    adapter = tie_rows(base, turned(base, adapter))
    return adapter, notes + checked_for(base, adapter, allow_base_mismatch)


def checked_for(base: Inventory, adapter: Adapter, allow_base_mismatch: bool) -> list[str]:
    """Check that the adapter is one for this base; what should be said."""
    check_names(base, adapter)
    check_dtypes(base, adapter)
    return check_base(base, adapter, allow_base_mismatch)


def found(source: str | os.PathLike[str] | Folder, revision: str | None = None, token: str | None = None) -> Folder:
    """The folder that a path or a hub id means. A local folder goes first; the hub is asked only for "user/repo"."""
    if isinstance(source, Folder):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise AdapterError(f"load takes a folder, a hub id or an Adapter; found {type(source).__name__}")
    path = Path(source)
    if isinstance(source, str) and hub.is_id(source) and not path.exists():
        if revision is None and path.parent.is_dir():
            have = sorted(child.name for child in path.parent.iterdir() if (child / CONFIG).is_file())
            raise AdapterError(
                f"{path.parent} holds no adapter {path.name!r}{did_you_mean(path.name, have)} (it has: "
                f"{', '.join(have[:8]) or 'none'}); if the hub's {source!r} is meant, give its revision, for example 'main'"
            )
        return hub.fetch(source, revision=revision, token=token)
    if revision is not None:
        raise AdapterError(f"revision={revision!r} is for the hub, and {path} is a local folder")
    return Folder(path)


def moved(adapter: Adapter, rename: Mapping[str, str]) -> Adapter:
    """`adapter` with other beginnings of its parameters' names, in its fingerprint too.

    Raises:
        AdapterError: a beginning that nothing has, or two names become one.
    """

    def new(name: str) -> str:
        for old, now in rename.items():
            if name == old or name.startswith(f"{old}.") or not old:
                rest = name if not old else name[len(old) + 1 :]
                return f"{now}.{rest}" if now else rest
        return name

    unused = [old for old in rename if old and not any(k.startswith(f"{old}.") for k in adapter.changes)]
    if unused:
        raise AdapterError(f"rename={dict(rename)!r}: no parameter of the adapter starts with {unused[0]!r}")
    changes = {new(k): replace(c, tied=tuple(new(t) for t in c.tied)) for k, c in adapter.changes.items()}
    if len(changes) < len(adapter.changes):
        raise AdapterError(f"rename={dict(rename)!r} gives two parameters the same name")
    base = dict(adapter.base)
    recorded = base.get("fingerprint")
    if isinstance(recorded, Mapping) and isinstance(recorded.get("parameters"), Mapping):
        base["fingerprint"] = {**recorded, "parameters": {new(k): e for k, e in recorded["parameters"].items()}}
    return adapter.replace(changes=changes, base=base)


def renamed(admitted: Admitted, rename: Mapping[str, str]) -> Admitted:
    """The same for an adapter from a file. What its config says of module names is of the old ones, and no longer asked."""
    copies = moved(Adapter(dict(admitted.adapter.changes)), rename).changes
    names = dict(zip(admitted.adapter.changes, copies))
    of_base = {names.get(k, k): t for k, t in admitted.parsed.base_copies.items()}
    parsed = replace(admitted.parsed, claims=None, base_copies=of_base)
    return replace(admitted, adapter=moved(admitted.adapter, rename), parsed=parsed, claimed=None)


def of_today(base: Inventory, admitted: Admitted) -> Admitted:
    """The same for a base whose modules have been renamed by the library that defines it since the adapter was made.

    Raises:
        AdapterError: the file changes only some of the layers that its config lists.
    """
    adapter, names, notes = under_todays_names(base.model, admitted.adapter, base.stored)
    if not notes:
        return admitted
    claims = admitted.parsed.claims
    gap = incomplete(adapter, base.stored) if claims is not None and claims.everywhere else None
    if gap is not None:
        raise AdapterError(f"the file has no tensors for {gap!r}, though it has for its like: it is incomplete")
    of_base = {names.get(k, k): t for k, t in admitted.parsed.base_copies.items()}
    parsed = replace(admitted.parsed, claims=None, base_copies=of_base)
    return replace(admitted, adapter=adapter, parsed=parsed, claimed=None, notes=(*admitted.notes, *notes))


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> stored shape of every base parameter and buffer, under all names of a shared one."""
    return inventory(model).shapes


def fitted(base: Inventory, admitted: Admitted) -> tuple[Adapter, list[str]]:
    """The adapter as the model of `base` can take it: every target of the file filled, base weights that it carries the model's own.

    Raises:
        AdapterError: a module that the config targets has no tensors, or the other way round.
    """
    adapter, notes = admitted.adapter, list(admitted.notes)
    if admitted.parsed.claims is not None:
        check_fit(base, adapter, admitted.parsed.claims, admitted.ours)
    adapter = tie_rows(base, turned(base, adapter))
    if admitted.parsed.start is not None:
        adapter = without_start(base.model, adapter, admitted.parsed.start)
        notes.append(f"the adapter was started by {admitted.parsed.start!r}: its start was computed from this base")
    adapter, more = folded(base.model, adapter, admitted.parsed.base_copies)
    if admitted.parsed.claims is not None and admitted.parsed.claims.ties:
        adapter = tie_equal(base, adapter)
    return adapter, notes + more


def check_base(base: Inventory, adapter: Adapter, allow: bool) -> list[str]:
    """Compare the base with the one that the adapter records. Returns what should be said.

    Raises:
        BaseMismatch: other weights, and not `allow`.
    """
    recorded = adapter.base.get("fingerprint")
    if not isinstance(recorded, Mapping):
        return [
            "the adapter does not record its base's fingerprint: it could not be verified that this is the base it was trained on"
        ]
    if any(tensor.is_meta for tensor in base.stored.values()):
        return ["the model is on the meta device: its base could not be verified"]
    result = prints.compare(base, recorded, prints.replaced(adapter))
    if not result.verified:
        return [
            "the adapter's fingerprint is of a kind that this version does not know: its base could not be verified"
        ]
    if result.other:
        lines = [f"{name}: {why}" for name, why in result.other.items()]
        total = len(recorded["parameters"].keys() | result.other.keys())
        message = (
            f"the adapter was trained on another base{_named(adapter)}: {len(lines)} of {total} parameters differ\n  "
            + "\n  ".join(lines[:6])
            + (f"\n  ... and {len(lines) - 6} more" if len(lines) > 6 else "")
        )
        if not allow:
            raise BaseMismatch(f"{message}\nload that base, or pass allow_base_mismatch=True if you mean this one")
        return [f"{message}\n(accepted: allow_base_mismatch)"]
    if result.precision:
        changes = sorted(set(result.precision.values()))
        return [f"same base in another precision ({', '.join(changes)}; {len(result.precision)} parameters)"]
    return []


def _named(adapter: Adapter) -> str:
    name = adapter.base.get("name")
    return f" ({name})" if name else ""


def paths_of(adapter: Adapter) -> set[str]:
    """The modules that an adapter changes."""
    return {split_key(key)[0] for key in adapter.changes}
