"""What a PEFT folder can say of a model: whether PEFT would do the same with an adapter in this very model, the shortest
target names that mean exactly the adapted modules, and a task type only where PEFT then finds all it wants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltaw.core.adapter import Adapter, join_key, split_key
from deltaw.core.host import CHILD
from deltaw.io.peft.claims import HEADS
from deltaw.io.peft.older_names import cannot_tell_experts
from deltaw.model.state import own_modules

TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""What PEFT refuses to save as a module."""


def declares_ties(model: nn.Module) -> bool:
    """Whether a model of transformers says that its head is its embedding."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False) and getattr(model, "_tied_weights_keys", None))


def task_of(model: nn.Module, adapter: Adapter) -> str | None:
    """PEFT's task type, if `model` is of such a class and PEFT then finds every tensor that it expects."""
    for ending, task in TASKS:
        if not type(model).__name__.removesuffix("Host").endswith(ending):
            continue
        heads = [
            path for path, _ in own_modules(model) if path and any(path.endswith(name) for name in HEADS.get(task, ()))
        ]
        needed = {join_key(p, n) for p in heads for n, _ in _own_parameters(model.get_submodule(p))}
        if needed - {key for key, change in adapter.changes.items() if change.variant.kind == "full"}:
            return None
        return task if task != "CAUSAL_LM" or hasattr(model, "prepare_inputs_for_generation") else None
    return None


def _own_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (join_key(path, site), p)
        for path, m in own_modules(module)
        for site, p in m._parameters.items()
        if p is not None
    ]


def cannot_place(model: nn.Module, adapter: Adapter) -> str | None:
    """Why PEFT would do something else with the adapter in this very model, or None."""
    return (
        cannot_place_copies(model, adapter) or cannot_place_rows(model, adapter) or cannot_tell_experts(model, adapter)
    )


def cannot_place_copies(model: nn.Module, adapter: Adapter) -> str | None:
    """PEFT takes full copies of modules as a whole, or of single biases."""
    modules = dict(own_modules(model))
    copied = {key for key, change in adapter.changes.items() if change.variant.kind == "full"}
    low = {split_key(key)[0] for key in adapter.changes if key not in copied}
    for key in copied:
        path, site = split_key(key)
        if path in low or site == "bias":
            continue
        whole = path in modules and not isinstance(modules[path], CONTAINERS)
        if not whole or {join_key(path, name) for name, _ in _own_parameters(modules[path])} - copied:
            return f"it would save the whole module around {key!r}, with the layers inside it"
    return None


def cannot_place_rows(model: nn.Module, adapter: Adapter) -> str | None:
    """PEFT computes a linear layer with chosen rows without its bias, and follows the ties that the model declares."""
    for key, change in adapter.changes.items():
        if change.variant.kind != "rows":
            continue
        if getattr(model.get_submodule(split_key(key)[0]), "bias", None) is not None:
            return f"it would leave out the bias of the layer with chosen rows {key!r}"
        if change.tied and not declares_ties(model):
            return f"{key!r} is one parameter with {change.tied[0]!r}, which the model does not declare: PEFT would change one"
    return None


def tighten(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`config` with the shortest names that mean exactly its modules in `model`; a regular expression if no list does."""
    paths = [path for path, _ in own_modules(model) if path]
    config = dict(config)
    saved = config.get("modules_to_save")
    if saved:
        saved = _outermost(saved, model)
        config["modules_to_save"] = _shortest(saved, paths, dotted=False) or saved
    if config.get("feedforward_modules"):
        return config  # must be among target_modules, and is matched in another way
    wanted = config.get("target_modules")
    if isinstance(wanted, list) and wanted:
        open_paths = [
            p
            for p in paths
            if not any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", p) for m in config.get("modules_to_save", ()))
        ]
        short = _shortest(wanted, open_paths, dotted=True)
        config["target_modules"] = short or "|".join(re.escape(p) for p in wanted)
    return config


def _outermost(saved: Sequence[str], model: nn.Module) -> list[str]:
    """`saved`, with a module in the place of its parts where all its parts are saved.

    A task type makes PEFT save `classifier` as a whole, which must not meet `classifier.dense` (RoBERTa's head).
    """
    whole: list[str] = []
    inside = tuple(p + "." for p in saved)
    for path, module in own_modules(model):
        if (
            not path
            or path.startswith(tuple(w + "." for w in whole))
            or (isinstance(module, CONTAINERS) and path not in saved)
        ):
            continue
        if path not in saved and not any(p.startswith(path + ".") for p in saved):
            continue
        keys = [f"{path}.{key}" for key in module.state_dict() if f".{CHILD}." not in f".{key}"]
        if path in saved or (keys and all(key.startswith(inside) for key in keys)):
            whole.append(path)
    return sorted(whole)


def _shortest(wanted: Sequence[str], paths: Sequence[str], dotted: bool) -> list[str] | None:
    """Last names, or else full paths, that PEFT's matching turns into exactly `wanted`."""
    for names in (sorted({p.rpartition(".")[2] for p in wanted}), sorted(wanted)):
        ends = tuple("." + n for n in names) if dotted else tuple(names)
        matched = {p for p in paths if p in names or p.endswith(ends)}
        if matched == set(wanted):
            return names
    return None
