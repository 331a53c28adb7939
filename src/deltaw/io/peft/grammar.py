"""A grammar turns (config, tensors) of one `peft_type` into an adapter, and an adapter into them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, did_you_mean
from deltaw.io.peft.claims import Claims

PREFIX = "base_model.model."
NAMED = re.compile(
    r"(\.lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)([^.]+)(?=\.weight$|\.bias$|$)"
)
"""An adapter's name in a tensor's, as in the state dict of a PeftModel; `save_pretrained` takes it out."""
Shapes = Mapping[str, tuple[int, ...]] | None
"""Stored shapes of the base's parameters by name, in the order in which the model registers them; None if not known."""


@dataclass(frozen=True)
class Parsed:
    """What a reader found.

    claims: what the config says of the model. base_copies: frozen base weights that the file carries along (PEFT adds
    a targeted embedding's): they must be the base's own. notes: what the reader has to say about the file. start: the start that PEFT took out of the base, if it follows from the
    base: only over the model can it be told what the adapter changes.
    """

    adapter: Adapter
    claims: Claims | None = None
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    start: str | None = None


class Grammar(ABC):
    """One `peft_type`. A file in this folder ends with `GRAMMAR = ...`, and is found by that."""

    peft_type: ClassVar[str]
    kinds: ClassVar[Sequence[str]]
    """The variants (by `kind`) that it can say, its own method's first."""
    cuts: ClassVar[bool] = False
    """Whether its files have matrices of rank zero, where every direction of a layer was cut."""

    @abstractmethod
    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes = None) -> Parsed:
        """The adapter that these say. `shapes`: what is known of the base, for the few things that only it can tell.

        Raises:
            AdapterError: a tensor is not used, a pair is incomplete, a shape or a rank disagrees.
        """

    @abstractmethod
    def cannot(self, adapter: Adapter) -> str | None:
        """Why this grammar cannot say `adapter`, or None if it can."""

    @abstractmethod
    def write(self, adapter: Adapter, shapes: Shapes = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(config, tensors) that say `adapter`; only for adapters that it can say. `shapes` as for `read`."""


@functools.cache
def grammars() -> tuple[Grammar, ...]:
    """All of them, the native one last."""
    package = importlib.import_module("deltaw.io.peft")
    found = []
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        grammar = getattr(importlib.import_module(f"deltaw.io.peft.{module}"), "GRAMMAR", None)
        if grammar is not None:
            found.append(grammar)
    return tuple(sorted(found, key=lambda g: g.peft_type == "DELTAW"))


def grammar_for(config: Mapping[str, Any]) -> Grammar:
    """The grammar of a config's `peft_type`.

    Raises:
        AdapterError: it is missing or not known.
    """
    wanted = config.get("peft_type")
    known = {g.peft_type: g for g in grammars()}
    if not isinstance(wanted, str) or wanted not in known:
        raise AdapterError(
            f"peft_type {wanted!r} cannot be read{did_you_mean(str(wanted), known)} (known: {', '.join(known)})"
        )
    return known[wanted]


def grammar_of(adapter: Adapter, wanted: str | None = None) -> Grammar:
    """The grammar to write `adapter` in: PEFT's own if one can say it, else the native one.

    Raises:
        AdapterError: `wanted` cannot say it; the message holds the reasons.
    """
    reasons = []
    for grammar in grammars():
        if (
            wanted is not None
            and grammar.peft_type != wanted
            and not (wanted == "PEFT" and grammar.peft_type != "DELTAW")
        ):
            continue
        reason = grammar.cannot(adapter)
        if reason is None:
            return grammar
        reasons.append(f"{grammar.peft_type}: {reason}")
    raise AdapterError("this adapter cannot be said in the grammar asked for:\n  " + "\n  ".join(reasons))


def plain_key(key: str) -> str:
    """A tensor's name in a file -> without PEFT's prefix and without what `torch.compile` and FSDP put in."""
    for inserted in ("_orig_mod.", "_fsdp_wrapped_module."):
        key = key.replace(inserted, "")
    return key.removeprefix(PREFIX)


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under their plain names.

    Raises:
        AdapterError: only some have PEFT's prefix, two become one, or they are of several adapters.
    """
    with_prefix = [PREFIX in k for k in tensors]
    if any(with_prefix) and not all(with_prefix):
        odd = [k for k in tensors if PREFIX not in k]
        raise AdapterError(f"only some of the tensors start with {PREFIX!r}; for example {odd[0]!r} does not")
    names = {n.group(2) for n in map(NAMED.search, tensors) if n}
    if len(names) > 1:
        raise AdapterError(
            f"the file holds the tensors of several adapters ({', '.join(sorted(names)[:4])}): it is a model's state_dict. "
            f"Save one of them with save_pretrained(..., selected_adapters=[...])"
        )
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        for name in names:
            plain = NAMED.sub(r"\1", plain).replace(f".modules_to_save.{name}.", ".")
        if plain in found:
            raise AdapterError(f"two tensors of the file mean {plain!r}")
        found[plain] = tensor
    return found
