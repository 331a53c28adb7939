"""`peft_type: "LORA"`: LoRA and DoRA, with whatever else such a file keeps (modules in full, biases).

Per module, PEFT's scale is alpha/r or, for the whole file, alpha/sqrt(r); r and alpha come each from its own pattern, else
from the file's one value. A plain alpha (no division) is written as alpha·r. Dropout is kept as a training note, where it
applies and how A and B started are not: those stay in deltaw's manifest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Adapter, Change
from deltaw.core.registry import variants
from deltaw.core.variant import Variant
from deltaw.errors import AdapterError, DeltawError
from deltaw.io.peft import config as fields
from deltaw.io.peft.claims import Claims, pattern_keys, pattern_value
from deltaw.io.peft.copies import Copies
from deltaw.io.peft.grammar import PREFIX, Grammar, Parsed, Shapes, strip_prefix
from deltaw.io.peft.places import Place, cannot_wrap, place_of, read_places, without_wrappers
from deltaw.io.peft.tokens import cannot_tokens, read_tokens, write_tokens

LOW = ("lora", "dora")
STYLES = {".lora_A": "mha", ".lora_B": "mha", ".lora_embedding_A": "embedding", ".lora_embedding_B": "embedding"}
"""Suffix -> how the file keeps the layer's tensors, where not as a linear layer's."""
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_A": "A",
    ".lora_B": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
    ".lora_B.bias": "b",
}
SUFFIX = re.compile(r"(?P<path>.*?)(?P<part>" + "|".join(map(re.escape, sorted(PARTS, key=len, reverse=True))) + r")$")
UNSUPPORTED = {
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA, which alters the base",
    "use_qalora": "QA-LoRA, which pools its input",
    "alora_invocation_tokens": "activated LoRA, which applies to part of the sequence",
    "layer_replication": "replicated layers, which change the model",
    "enable_lora": "a MergedLinear of old PEFT versions",
}


class LoraGrammar(Grammar):
    """Reads and writes LoRA's config and keys."""

    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[tuple[str, ...]] = (*LOW, "full", "diff", "rows")

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes = None) -> Parsed:
        notes = fields.check(config, UNSUPPORTED)
        claims = Claims.of(config)
        groups: dict[tuple[str, str], dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in without_wrappers(strip_prefix(tensors), claims, shapes).items():
            found = SUFFIX.match("." + key)
            if found is None:
                rest[key] = tensor
                continue
            suffix = found.group("part")
            part, style = PARTS[suffix], STYLES.get(suffix, "linear")
            at = (found.group("path")[1:], style)
            if part in groups.setdefault(at, {}):
                raise AdapterError(f"{key}: the file holds {part} of {at[0]!r} twice")
            groups[at][part] = tensor
        for path, style in [at for at in groups if at[1] == "embedding"]:
            groups[path, style] |= groups.pop((path, "linear"), {})  # DoRA's vector, whose name does not tell
        places = read_places(groups, claims, shapes)
        changes: dict[str, Change] = {}
        made: dict[str, Variant] = {}
        for at, parts in groups.items():
            place = places[at]
            variant, warned = self._variant(config, place, parts, made)
            notes += warned
            changes[place.key] = place.read(variant, parts)
            if "b" in parts:
                changes[place.bias_key] = bias_change(variant, parts["b"])
        tokens, rest = read_tokens(rest, config)
        changes |= tokens
        copies = Copies.read(rest, config, claims, {p.path for p in places.values()})
        for key, change in copies.changes.items():
            changes[key] = with_added(key, change, changes.get(key))
        base = fields.base_of(config)
        return Parsed(
            Adapter(changes, base, fields.extra_of(config)),
            claims,
            copies.of_base,
            tuple(dict.fromkeys(notes)),
            fields.start_of(config),
        )

    def _variant(
        self, config: Mapping[str, Any], place: Place, parts: Mapping[str, Tensor], made: dict[str, Variant]
    ) -> tuple[Variant, list[str]]:
        """The variant of one place, with its own rank and alpha. made: those of earlier places, by rank and alpha."""
        dora = bool(config.get("use_dora"))
        needed = {"A", "B", "m"} if dora else {"A", "B"}
        biased = bool(config.get("lora_bias"))
        needed |= {"b"} if biased and place.style == "linear" else set(parts) & {"b"}
        if set(parts) != needed:
            missing, extra = sorted(needed - set(parts)), sorted(set(parts) - needed)
            raise AdapterError(
                f"{place.path!r}: "
                + (f"{' and '.join(missing)} missing" if missing else f"{' and '.join(extra)} not expected")
                + f" (use_dora is {dora}, lora_bias is {biased}){': the file is incomplete' if missing else ''}"
            )
        rank, rank_hits = pattern_value(config.get("rank_pattern") or {}, place.target, config.get("r", 8))
        alpha, hits = pattern_value(config.get("alpha_pattern") or {}, place.target, config.get("lora_alpha", 8))
        found = parts["A"].shape[0] if parts["A"].ndim else 0
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"{place.path!r}: the rank in the config is {rank!r}, no whole number from 1 on")
        if found != rank and not (place.style == "parameter" and found % rank == 0):
            raise AdapterError(f"{place.path!r}: A has rank {found}, the config says {rank}")
        notes = []
        if len({(config.get("alpha_pattern") or {})[h] for h in hits}) > 1 or len(rank_hits) > 1:
            notes.append(
                f"several patterns of the config match {place.path!r}; the first, {(hits or rank_hits)[0]!r}, counts, as in PEFT"
            )
        scaling = "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
        own = f"{rank!r} {alpha!r}"
        if own not in made:
            try:
                kind = variants["dora" if dora else "lora"]
                made[own] = kind(rank=rank, alpha=alpha, scaling=scaling, dropout=config.get("lora_dropout") or 0.0)
            except DeltawError as error:
                raise AdapterError(f"{place.path!r}: {error}") from error
        return made[own], notes

    def cannot(self, adapter: Adapter) -> str | None:
        low = low_rank(adapter)
        if not low:
            return "nothing in it is low-rank, and PEFT loads no file that adapts no layer"
        foreign = sorted({c.variant.kind for c in adapter.changes.values()} - set(self.kinds))
        if foreign:
            return f"it has no word for the method {foreign[0]!r}"
        if len({c.variant.kind for c in low.values()}) > 1:
            return "one file is either LoRA or DoRA, and this adapter has both"
        for key, change in low.items():
            reason = place_of(key, change).cannot(change)
            if reason:
                return f"{key}: {reason}"
        places = {key: place_of(key, change) for key, change in low.items()}
        return (
            cannot_attention(places, low)
            or cannot_wrap(places, adapter.changes)
            or cannot_biases(adapter, places)
            or cannot_tokens(adapter)
            or Copies.cannot(adapter, {p.path for p in places.values()})
        )

    def write(self, adapter: Adapter, shapes: Shapes = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        low = low_rank(adapter)
        config: dict[str, Any] = {"peft_type": self.peft_type, "bias": "none", "inference_mode": True}
        tensors: dict[str, Tensor] = {}
        root = bool(low) and all(c.variant.scaling == "alpha/sqrt(rank)" for c in low.values())  # type: ignore[attr-defined]
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        ordered = list(shapes) if shapes else list(low)
        raw = [k for k in ordered if k in low and place_of(k, low[k]).style == "parameter"]
        places = {key: place_of(key, change, raw) for key, change in low.items()}
        for key, change in low.items():
            place, v = places[key], change.variant
            ranks[place.target] = v.rank  # type: ignore[attr-defined]
            alphas[place.target] = peft_alpha(v, root)
            tensors |= {PREFIX + name: t for name, t in place.write(change).items()}
            added = adapter.changes.get(place.bias_key)
            if added is not None and added.variant.kind == "diff":
                config["lora_bias"] = True
                tensors[f"{PREFIX}{place.path}.lora_B.bias"] = added.tensors["diff"] / v.scale  # type: ignore[attr-defined]
        config["r"], config["rank_pattern"] = common(ranks, 8)
        config["lora_alpha"], config["alpha_pattern"] = common(alphas, 8)
        fields.put(config, "target_parameters", sorted(raw), [])
        config["target_modules"] = sorted(set(ranks) - set(raw))
        dropouts = {getattr(c.variant, "dropout", 0.0) for c in low.values()}
        fields.put(config, "lora_dropout", dropouts.pop() if len(dropouts) == 1 else 0.0, 0.0)
        fields.put(config, "use_rslora", root, False)
        fields.put(config, "use_dora", any(c.variant.kind == "dora" for c in low.values()), False)
        for name in ("rank_pattern", "alpha_pattern"):
            fields.put(config, name, config.pop(name), {})
        adapted = {p.path for p in places.values()}
        for key, t in {**Copies.write(adapter, config, adapted), **write_tokens(adapter, config)}.items():
            tensors[PREFIX + key] = t
        fields.write_facts(config, adapter)
        return config, tensors


def cannot_attention(places: Mapping[str, Place], low: Mapping[str, Change]) -> str | None:
    """PEFT adapts both projections of nn.MultiheadAttention, with one rank and alpha, or neither."""
    both: dict[str, list[Any]] = {}
    for key, place in places.items():
        if place.style == "mha" or place.written.endswith(".out_proj"):
            both.setdefault(place.target, []).append(low[key].variant)
    for target, said in both.items():
        if len(said) != 2 or (said[0].rank, said[0].scale) != (said[1].rank, said[1].scale):
            return f"{target}: PEFT adapts in_proj and out_proj together, with one rank and alpha"
    return None


def cannot_biases(adapter: Adapter, places: Mapping[str, Place]) -> str | None:
    """`lora_bias` comes with all adapted layers or with none."""
    added = {k for k, c in adapter.changes.items() if c.variant.kind == "diff"}
    if not added:
        return None
    if any(p.style not in ("linear", "conv") or p.written for p in places.values()):
        return "it adds to the biases of linear layers and convolutions only"
    if added != {p.bias_key for p in places.values()}:
        return "it adds dense changes to the biases of all adapted layers, or to nothing"
    return None


def peft_alpha(variant: Variant, root: bool) -> float:
    """The alpha that gives `variant`'s scale under PEFT's rule (alpha/sqrt(rank) if `root`, else alpha/rank)."""
    rank, scale = int(variant.rank), float(variant.scale)  # type: ignore[attr-defined]
    alpha = variant.alpha  # type: ignore[attr-defined]
    if variant.scaling == ("alpha/sqrt(rank)" if root else "alpha/rank"):  # type: ignore[attr-defined]
        exact = 2.0 * rank if alpha is None else float(alpha)
    else:
        exact = scale * (rank**0.5 if root else rank)
    return int(exact) if exact == int(exact) else exact


def common(values: Mapping[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and patterns for the paths that have another."""
    if not values:
        return default, {}
    most = Counter(values.values()).most_common(1)[0][0]
    return most, pattern_keys({p: v for p, v in values.items() if v != most}, list(values))


def low_rank(adapter: Adapter) -> dict[str, Change]:
    """The changes that are low-rank."""
    return {k: c for k, c in adapter.changes.items() if c.variant.kind in LOW}


def bias_change(variant: Variant, b: Tensor) -> Change:
    """`lora_bias`: the layer's bias grows by scale · b."""
    if b.ndim != 1 or not b.is_floating_point():
        raise AdapterError(f"lora_B.bias must be a vector, found {tuple(b.shape)} of {b.dtype}")
    return Change(variants["diff"](), {"diff": variant.scale * b}, None, tuple(b.shape))  # type: ignore[attr-defined]


def with_added(key: str, copy: Change, added: Change | None) -> Change:
    """A full copy of a parameter, with what `lora_bias` adds to it where it is a bias.

    Raises:
        AdapterError: there is another change of it, or one of another shape.
    """
    if added is None:
        return copy
    if added.variant.kind != "diff" or added.shape != copy.shape:
        raise AdapterError(f"{key}: the file holds both a low-rank change and a full copy of it")
    value = copy.tensors["value"]
    return replace(copy, tensors={"value": value + added.tensors["diff"].to(value.dtype)})


GRAMMAR = LoraGrammar()
