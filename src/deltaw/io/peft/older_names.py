"""Adapters made when the modules of a transformers model had other names, and its experts were layers of their own.

transformers 5 renamed modules (ViT's `encoder.layer.0.attention.attention.query` is `layers.0.attention.q_proj`, the
`language_model.model` of a vision model is `model.language_model`) and laid the experts of a mixture into one parameter
each (w1 and w3 of all experts are `experts.gate_up_proj`). It keeps, per model, the rules by which it reads its own old
checkpoints. The same rules are used here on an adapter's names, and both steps are exact: a renamed parameter is the same
parameter, and a stack of changes is the change of the stack, A below A and B in blocks,

    [W1 + s B1 A1; W3 + s B3 A3] = [W1; W3] + s [B1 0; 0 B3] [A1; A3].

Nothing is done unless every name that the model lacks becomes one that it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change, split_key
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io.peft.places import family

FUSED_BY_PEFT = ("mixtral", "qwen2_moe")
"""Families whose expert layers PEFT (0.19 on) takes any target called so to mean, shared experts and dense ones too."""
EXPERT_LAYERS = frozenset(["gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"])


@dataclass
class Stack:
    """One stacked parameter (E, S · out, in), and the changes of the layers that it was made from.

    sources: S, how many layers lie one below the other in each expert. parts: (expert, which of them) -> change.
    """

    sources: int
    parts: dict[tuple[int, int], Change] = field(default_factory=dict)


class Today(NamedTuple):
    """What became of an adapter's names. names: old name -> new one, for what was only renamed."""

    adapter: Adapter
    names: Mapping[str, str]
    notes: list[str]


def under_todays_names(model: nn.Module, adapter: Adapter, have: Mapping[str, Tensor]) -> Today:
    """`adapter` under the names that `model` has now; as it is if it has them, or if no rule leads there.

    have: the model's parameters and buffers by name.

    Raises:
        AdapterError: changes of single experts that cannot be said of the stack that they are in now.
    """
    missing = [key for key in adapter.changes if plain(key) not in have]
    if not missing:
        return Today(adapter, {}, [])
    renamings, converters = rules_of(model)
    names: dict[str, str] = {}
    stacks: dict[str, Stack] = {}
    for key in missing:
        new, source = renamed(plain(key), renamings, converters)
        if new not in have:
            return Today(adapter, {}, [])
        if source is None:
            names[key] = new + key[len(plain(key)) :]
        else:
            stack = stacks.setdefault(new, Stack(len(source.pattern_of)))
            stack.parts[source.expert, source.which] = adapter.changes[key]
    changes: dict[str, Change] = {}
    for key, change in adapter.changes.items():
        if key in names or key not in missing:
            tied = tuple(names.get(t, t) for t in change.tied)
            changes[names.get(key, key)] = replace(change, tied=tied) if tied else change
    if len(changes) + len(missing) - len(names) != len(adapter.changes) or changes.keys() & stacks.keys():
        return Today(adapter, {}, [])  # two names became one
    changes |= {key: stacked(key, stack, tuple(have[key].shape)) for key, stack in stacks.items()}
    first = missing[0]
    now = names.get(first) or next(iter(stacks))
    note = (
        f"the adapter was made when {len(missing)} of its parameters had other names in {type(model).__name__} "
        f"({first!r} is {now!r} now): they were taken over by transformers' rules for old checkpoints"
    )
    return Today(adapter.replace(changes=changes, base=with_names(adapter.base, renamings, have)), names, [note])


def plain(key: str) -> str:
    """A parameter's name without the part of it that is meant: "qkv.weight[0:8]" -> "qkv.weight"."""
    return key.partition("[")[0]


@dataclass(frozen=True)
class Source:
    """Where in a stack a layer's weight went. pattern_of: the names of all layers of one expert, in their order."""

    expert: int
    which: int
    pattern_of: tuple[str, ...]


def rules_of(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' rules for old checkpoints of `model`: those that rename, and those that stack experts."""
    if getattr(getattr(model, "config", None), "model_type", None) is None:
        return [], []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model) or []
    except (ImportError, AttributeError, TypeError, ValueError):  # another version of transformers: no rules
        return [], []
    found = [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]
    return found[0], [r for r in found[1] if stacks_experts(r)]


def stacks_experts(rule: Any) -> bool:
    """Whether a rule lays experts' weights behind, and then their kinds below, each other: that alone is done here."""
    known = {"MergeModulelist": 0, "Concatenate": 1}
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    return len(rule.target_patterns) == 1 and steps in ([*known.items()][:1], [*known.items()])


def renamed(name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, Source | None]:
    """A parameter's name today, and where in a stack it lies, if it does."""
    for rule in renamings:
        name, _ = rule.rename_source_key(name)
    for rule in converters:
        new, source = rule.rename_source_key(name)
        expert = re.search(r"\.(\d+)\.[^.]+\.[^.]+$", name)
        if source is not None and expert is not None:
            patterns = tuple(rule.source_patterns)
            return new, Source(int(expert.group(1)), patterns.index(source), patterns)
    return name, None


def with_names(base: Mapping[str, Any], renamings: list[Any], have: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the adapter records of its base, under today's names where there are any."""
    found = dict(base)
    recorded = found.get("fingerprint")
    if isinstance(recorded, Mapping) and isinstance(recorded.get("parameters"), Mapping):
        entries = {
            (k if k in have else renamed(k, renamings, [])[0]): entry for k, entry in recorded["parameters"].items()
        }
        if len(entries) == len(recorded["parameters"]):
            found["fingerprint"] = {**recorded, "parameters": entries}
    return found


def stacked(key: str, stack: Stack, shape: tuple[int, ...]) -> Change:
    """The one change of a stack (E, S · out, in). An expert or a layer that has no change of its own gets zeros.

    Raises:
        AdapterError: a change is no plain LoRA, or its shape is not the expert's.
    """
    kinds = {c.variant.kind for c in stack.parts.values()}
    if kinds != {"lora"}:
        raise AdapterError(
            f"{key!r} holds all experts in one parameter now, and the file changes them one by one by "
            f"{' and '.join(sorted(kinds))}: only plain LoRA can be taken over into the stack"
        )
    experts, rows, columns = shape
    out = rows // stack.sources
    first: Any = next(iter(stack.parts.values())).variant
    ranks = [
        max((int(c.tensors["A"].shape[0]) for (_, which), c in stack.parts.items() if which == s), default=0)
        for s in range(stack.sources)
    ]
    some = next(iter(stack.parts.values())).tensors["A"]
    A, B = some.new_zeros(experts, sum(ranks), columns), some.new_zeros(experts, rows, sum(ranks))
    for (expert, which), change in stack.parts.items():
        a, b, v = change.tensors["A"], change.tensors["B"], change.variant
        if expert >= experts or a.ndim != 2 or a.shape[1] != columns or b.shape[0] != out:
            raise AdapterError(
                f"{key!r}: expert {expert} is changed by A {tuple(a.shape)} and B {tuple(b.shape)}; "
                f"the model has {experts} of ({out}, {columns})"
            )
        start = sum(ranks[:which])
        A[expert, start : start + a.shape[0]] = a
        B[expert, which * out : (which + 1) * out, start : start + a.shape[0]] = b * (v.scale / first.scale)  # type: ignore[attr-defined]
    rank = sum(ranks)
    alpha = first.scale * {"alpha/rank": rank, "alpha/sqrt(rank)": rank**0.5, "alpha": 1}[first.scaling]
    variant = variants["lora"](rank=rank, alpha=alpha, scaling=first.scaling)
    return Change(variant, {"A": A.contiguous(), "B": B.contiguous()}, "module", shape)


def incomplete(adapter: Adapter, have: Mapping[str, Tensor]) -> str | None:
    """A parameter that an adapter of listed targets should change too, as it changes its like in another block; or None."""

    def like(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)  # the numbers of blocks; `fc1` is a name

    changed = {key for key, c in adapter.changes.items() if not c.variant.any_shape}
    kinds = {like(key) for key in changed}
    return next((name for name in have if name not in adapter.changes and like(name) in kinds), None)


def cannot_tell_experts(model: nn.Module, adapter: Adapter) -> str | None:
    """Why PEFT would take layers that `adapter` changes (shared experts, dense layers) for those of the experts, or None.

    PEFT turns every target called `gate_proj`, `up_proj`, `down_proj` into the stacked experts, for the families that
    transformers loads by the rules of Mixtral or Qwen2-MoE: the layers of that name are then left without adapter. Raw
    parameters, which it targets in another way, keep their names.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return None
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as patterns
    except ImportError:
        return None
    if {**patterns, "mixtral": "mixtral"}.get(kind) not in FUSED_BY_PEFT:
        return None
    layers = (k for k, c in adapter.changes.items() if not c.variant.any_shape and family(k, c) != "module")
    named = next((key for key in layers if split_key(key)[0].rpartition(".")[2] in EXPERT_LAYERS), None)
    return None if named is None else f"it would take {named!r} for a part of the stacked experts of this model"
