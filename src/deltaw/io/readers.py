"""Who can read an adapter, and who would refuse or misread it: PEFT, vLLM, SGLang, llama.cpp with Ollama.

A misreading is worse than a refusal: servers that know one global rank and alpha read a file with patterns without a word,
and apply wrong scales. `uniform` is the cure: the same changes, written with one rank and every scale inside B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.core.adapter import Adapter, Change, split_key
from deltaw.core.registry import variants
from deltaw.errors import AdapterError, did_you_mean
from deltaw.io.peft import grammar_of
from deltaw.io.peft.places import family

READERS = ("peft", "vllm", "sglang", "ollama")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Verdict:
    """What one reader does with an adapter: `refuses` and `misreads` name the reasons, `cure` says how to export."""

    reader: str
    refuses: tuple[str, ...] = ()
    misreads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    cure: str = ""

    @property
    def fine(self) -> bool:
        """It reads the adapter as it is meant."""
        return not self.refuses and not self.misreads


def verdict(adapter: Adapter, reader: str, config: Mapping[str, Any] | None = None) -> Verdict:
    """What `reader` does with `adapter` (as `config` says it, or as `dw.write` would).

    Raises:
        AdapterError: no such reader.
    """
    if reader not in READERS:
        raise AdapterError(f"--for {reader}: known are {', '.join(READERS)}{did_you_mean(reader, READERS)}")
    config = dict(grammar_of(adapter).write(adapter)[0]) if config is None else config
    if reader == "peft":
        if config["peft_type"] == "DELTAW":
            return Verdict("peft", (f"PEFT has no words for it ({_reason(adapter)})",), cure="merge it: deltaw merge")
        return Verdict("peft")
    refuses = _server_refuses(adapter, config, reader)
    misreads = _server_misreads(config, reader)
    needs: tuple[str, ...] = ()
    rank = max((getattr(c.variant, "rank", 0) for c in adapter.changes.values()), default=0)
    if reader == "vllm" and rank:
        if rank > VLLM_RANKS[-1]:
            refuses.append(f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}")
        else:
            needs = (f"--max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)}",)
    if reader == "ollama":
        needs = ("a GGUF file: deltaw convert ADAPTER --to gguf --base MODEL --out FILE.gguf",)
    cure = ""
    if refuses:
        cure = "merge it (deltaw merge), or approximate it by a plain LoRA with a stated error (deltaw extract of the merged model)"
    elif misreads:
        cure = f"deltaw convert ADAPTER --to peft --for {reader} --out DIR writes one rank and every scale inside B"
    return Verdict(reader, tuple(refuses), tuple(misreads), needs, cure)


def _reason(adapter: Adapter) -> str:
    try:
        grammar_of(adapter, "PEFT")
    except AdapterError as error:
        return str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
    return "it was written in deltaw's own grammar"


def _server_refuses(adapter: Adapter, config: Mapping[str, Any], reader: str) -> list[str]:
    found = []
    kinds = {c.variant.kind for c in adapter.changes.values()}
    copied = sorted(k for k, c in adapter.changes.items() if c.variant.kind == "full")
    if config["peft_type"] != "LORA":
        found.append(f"peft_type {config['peft_type']}: only LORA is served")
    if config.get("use_dora"):
        found.append("DoRA: its row scaling is not of low rank")
    if kinds - {"lora", "dora", "full"}:
        found.append(f"the method {sorted(kinds - {'lora', 'dora', 'full'})[0]}: only plain LoRA is served")
    if copied:
        found.append(
            f"parameters trained in full (modules_to_save, biases): {copied[0]}{' ...' if len(copied) > 1 else ''}"
        )
    layers = {family(k, c) for k, c in adapter.changes.items() if c.variant.kind not in ("full", "diff")}
    layers -= {"linear", "linear (own forward)", "embedding"}
    if layers:
        found.append(f"layers of the family {sorted(layers)[0]}: only linear layers are served")
    if reader == "ollama" and any(c.layer == "embedding" for c in adapter.changes.values()):
        found.append("an adapted embedding")
    return found


def _server_misreads(config: Mapping[str, Any], reader: str) -> list[str]:
    found = []
    for field in ("rank_pattern", "alpha_pattern"):
        if config.get(field):
            found.append(f"{field} is ignored: layers with a rank or alpha of their own get a wrong scale")
    if config.get("use_rslora") and reader in ("sglang", "ollama"):
        found.append("use_rslora is ignored: the scale becomes alpha/rank instead of alpha/sqrt(rank)")
    return found


def uniform(adapter: Adapter) -> Adapter:
    """The same changes with one rank, alpha = rank and scale 1: B takes the scale, smaller ranks are padded with zeros.

    Raises:
        AdapterError: a change is not a plain LoRA.
    """
    lora = variants["lora"]
    odd = [k for k, c in adapter.changes.items() if c.variant.kind != "lora"]
    if odd:
        change = adapter.changes[odd[0]]
        raise AdapterError(
            f"{odd[0]!r} is changed by {change.variant}, which is no plain LoRA: merge the adapter, or extract a "
            f"low-rank one from the merged model (deltaw extract), which states its error"
        )
    rank = max(c.variant.rank for c in adapter.changes.values())  # type: ignore[attr-defined]
    changes = {}
    for key, change in adapter.changes.items():
        A, B = change.tensors["A"], change.tensors["B"]
        more = rank - A.shape[-2]
        scale = change.variant.scale  # type: ignore[attr-defined]
        tensors = {
            "A": torch.nn.functional.pad(A, (0, 0, 0, more)),
            "B": torch.nn.functional.pad((B.double() * scale).to(B.dtype), (0, more)),
        }
        changes[key] = Change(lora(rank=rank, alpha=rank), tensors, change.layer, change.shape, change.tied)
    return adapter.replace(changes=changes)


def modules(adapter: Adapter) -> dict[str, int]:
    """Last names of the changed modules -> how many."""
    found: dict[str, int] = {}
    for key in adapter.changes:
        path, site = split_key(key)
        name = path.rpartition(".")[2]
        name = name if site == "weight" and name else f"{name}.{site}" if name else site
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
