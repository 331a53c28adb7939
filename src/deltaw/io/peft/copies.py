"""What a PEFT file keeps beside low-rank tensors: modules in full, biases, and copies of the base.

Three ways to say "this parameter has this value": `modules_to_save` (plain names, the config lists the modules), the bias
modes ("lora_only", "all": `.base_layer.bias` in adapted layers), and embeddings that PEFT adds on its own. All become
changes of the variant Full, except `.base_layer.weight`: it is the frozen weight under a low-rank change, a claim about
the base, which `load` checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change, split_key
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io.peft.claims import Claims

BASE = ".base_layer"
EMBEDDINGS = frozenset(
    [
        "embed_tokens",
        "lm_head",
        "wte",
        "word_embeddings",
        "shared",
        "embed_in",
        "embed_out",
        "tok_embeddings",
        "word_embedding",
        "embeddings",
        "embedding",
        "embed",
        "token_embedding",
        "decoder",
        "vocab_projector",
        "generator_lm_head",
        "lm_loss",
        "proj",
        "proj_out",
        "output_projection",
        "head",
    ]
)
"""Input embeddings and output heads of transformers' models: PEFT saves them in full, unasked, after a vocabulary was
resized or where one of them is targeted (a head with its bias)."""


@dataclass(frozen=True)
class Copies:
    """`changes`: parameters with a value of their own. `of_base`: frozen weights that the file carries along."""

    changes: dict[str, Change]
    of_base: dict[str, Tensor]

    @staticmethod
    def read(rest: Mapping[str, Tensor], config: Mapping[str, Any], claims: Claims, adapted: set[str]) -> Copies:
        """Sort the tensors that no low-rank change took.

        Raises:
            AdapterError: nothing in the config accounts for a tensor.
        """
        full = variants["full"]()
        biases = config.get("bias") in ("all", "lora_only")
        found = Copies({}, {})
        for key, tensor in rest.items():
            path, site = split_key(key)
            if doubled(key, rest, claims):
                continue
            plain = path.replace(BASE, "")
            if path != plain:
                if plain not in adapted:
                    raise AdapterError(f"{key!r} belongs to no adapted layer of the file")
                if site.endswith("bias") and (biases or is_embedding(plain, site, f"{path}.weight", rest)):
                    found.changes[f"{plain}.{site}"] = Change(full, {"value": tensor}, None, tuple(tensor.shape))
                    continue
                if site == "weight" and path.endswith(BASE):
                    found.of_base[f"{plain}.{site}"] = tensor
                    continue
                raise AdapterError(f"{key!r} is not accounted for: the config says bias={config.get('bias')!r}")
            known = claims.saves(path) or (site.endswith("bias") and config.get("bias") == "all")
            if not known and not is_embedding(path, site, f"{path}.weight", rest):
                raise AdapterError(
                    f"the file holds the tensor {key!r}, which nothing in its config accounts for "
                    f"(modules_to_save is {list(claims.modules_to_save) or None}): it would be ignored silently"
                )
            found.changes[key] = Change(full, {"value": tensor}, None, tuple(tensor.shape))
        return found

    @staticmethod
    def cannot(adapter: Adapter, adapted: set[str]) -> str | None:
        """Why the full copies of `adapter` cannot be said in PEFT's way, or None."""
        for key, change in adapter.changes.items():
            path, site = split_key(key)
            if change.variant.kind != "full":
                continue
            if not path:
                return f"{key!r} belongs to the model itself, which is no module to save"
            if change.tied:
                return f"{key!r} is one parameter with {change.tied[0]!r}, and PEFT would replace one of the two"
            if path in adapted and not site.endswith("bias"):
                return f"{key!r} is a full copy inside a layer that also has a low-rank change"
        return None

    @staticmethod
    def write(adapter: Adapter, config: dict[str, Any], adapted: set[str]) -> dict[str, Tensor]:
        """The tensors of the full copies, and in `config` the fields that account for them."""
        found: dict[str, Tensor] = {}
        modules: dict[str, None] = {}
        sites: dict[str, set[str]] = {}
        for key, change in adapter.changes.items():
            if change.variant.kind == "full":
                path, site = split_key(key)
                sites.setdefault(path, set()).add(site)
        for key, change in adapter.changes.items():
            if change.variant.kind != "full":
                continue
            path, site = split_key(key)
            if path in adapted:
                config["bias"] = "all" if config["bias"] == "all" else "lora_only"
                inner = f"{path.removesuffix('.out_proj')}{BASE}.out_proj" if is_inner(path, adapted) else path
                found[f"{inner}{BASE}.{site}"] = change.tensors["value"]
            elif sites[path] == {"bias"}:
                config["bias"] = "all"
                found[key] = change.tensors["value"]
            else:
                modules[path] = None
                found[key] = change.tensors["value"]
        saved = sorted(modules)
        saved = [p for p in saved if not any(p.startswith(q + ".") for q in saved)]
        if saved:
            config["modules_to_save"] = saved
        return found


def is_embedding(path: str, site: str, weight: str, rest: Mapping[str, Tensor]) -> bool:
    """Whether PEFT saves this parameter unasked: the matrix of an embedding or head, or the bias beside it in the file."""
    matrix = rest.get(weight)
    return (
        path.rpartition(".")[2] in EMBEDDINGS and site in ("weight", "bias") and matrix is not None and matrix.ndim == 2
    )


def doubled(key: str, rest: Mapping[str, Tensor], claims: Claims) -> bool:
    """Whether a tensor is one that PEFT writes twice: with bias="all", it lists a saved module's biases again, under the
    names of its wrapper, and those of the frozen original, which the saved module replaces.

    Raises:
        AdapterError: the two copies differ.
    """
    for inner in (".modules_to_save.", ".original_module."):
        outer, found, site = key.partition(inner)
        if not found or not claims.saves(outer):
            continue
        twin = rest.get(f"{outer}.{site}")
        if twin is None:
            return False
        if inner == ".modules_to_save." and not torch.equal(twin, rest[key]):
            raise AdapterError(f"{key!r} and {outer}.{site!r} should be the same values, and are not")
        return True
    return False


def is_inner(path: str, adapted: set[str]) -> bool:
    """Whether `path` is the output projection of an adapted nn.MultiheadAttention, which PEFT wraps inside it."""
    return path.endswith(".out_proj") and path.removesuffix(".out_proj") in adapted
