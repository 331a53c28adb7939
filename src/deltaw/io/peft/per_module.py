"""The frame of PEFT types that keep a few tensors per module: which suffix is which, one variant per module."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from deltaw.core.adapter import Adapter, Change, join_key, split_key
from deltaw.errors import AdapterError, DeltawError
from deltaw.io.peft import config as fields
from deltaw.io.peft.claims import Claims, pattern_keys, pattern_value
from deltaw.io.peft.copies import Copies
from deltaw.io.peft.grammar import PREFIX, Grammar, Parsed, Shapes, strip_prefix

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LYCORIS = ("linear", "linear (own forward)", "conv1d", "conv2d")
"""Layer families that PEFT's LoHa and LoKr adapt."""


class Beside(NamedTuple):
    """What a module's tensors may have to be read with. shared: the file's tensors that belong to no module, by full name.
    shapes: those of the base's parameters by name, empty where no model is at hand."""

    shared: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]


class PerModule(Grammar):
    """Read: sort the tensors by module, ask `change` for each. Write: ask `tensors` for each, and `config_of` for all."""

    suffixes: ClassVar[Mapping[str, str]]
    """Suffix in the file -> part."""
    kind: ClassVar[str]
    unsupported: ClassVar[Mapping[str, str]] = {}
    layers: ClassVar[tuple[str, ...]] = ("linear", "linear (own forward)", "conv1d_gpt2")

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """This type's variant, and full copies."""
        return (self.kind, "full")

    @abstractmethod
    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], beside: Beside) -> Change:
        """The change of the module at `path`."""

    @abstractmethod
    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        """Part -> tensor, as the file keeps them."""

    @abstractmethod
    def config_of(self, changes: Mapping[str, Change]) -> dict[str, Any]:
        """The method's own fields; `changes` by module path."""

    def take_shared(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take tensors that belong to no module out of `tensors`."""
        return {}

    def shared(self, changes: Mapping[str, Change]) -> dict[str, Tensor]:
        """The tensors that belong to no module, under their full names."""
        return {}

    def cannot_also(self, changes: Mapping[str, Change]) -> str | None:
        """A reason of the method's own."""
        return None

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes = None) -> Parsed:
        notes = fields.check(config, self.unsupported)
        claims = Claims.of(config)
        mine = dict(tensors)
        beside = Beside(self.take_shared(mine), shapes or {})
        groups: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in strip_prefix(mine).items():
            for suffix, part in self.suffixes.items():
                if key.endswith("." + suffix):
                    groups.setdefault(key.removesuffix("." + suffix), {})[part] = tensor
                    break
            else:
                rest[key] = tensor
        changes: dict[str, Change] = {}
        for path, parts in groups.items():
            for part, tensor in parts.items():
                if not tensor.is_floating_point():
                    raise AdapterError(f"{path!r}: {part} is {tensor.dtype}; an adapter's tensors are real numbers")
            try:
                change = self.change(config, path, parts, beside)
                _ = change.matrix_shape
            except AdapterError as error:
                raise AdapterError(f"{path!r}: {error}") from error
            except KeyError as error:
                raise AdapterError(f"{path!r}: the tensor {error} is missing") from error
            except (DeltawError, ValueError, IndexError, RuntimeError, TypeError) as error:
                raise AdapterError(f"{path!r}: its tensors do not fit together: {error}") from error
            changes[join_key(path, "weight")] = change
        copies = Copies.read(rest, config, claims, set(groups))
        clash = sorted(set(copies.changes) & set(changes))
        if clash:
            raise AdapterError(f"{clash[0]}: the file holds both a change and a full copy of it")
        changes |= copies.changes
        adapter = Adapter(changes, fields.base_of(config), fields.extra_of(config))
        return Parsed(adapter, claims, copies.of_base, tuple(notes))

    def cannot(self, adapter: Adapter) -> str | None:
        mine = self._mine(adapter)
        for key, change in adapter.changes.items():
            if change.variant.kind not in self.kinds:
                return f"it has no word for the method {change.variant.kind!r}"
            if change.variant.kind == self.kind and split_key(key)[1] != "weight":
                return f"it changes only weights, not {key!r}"
            if change.variant.kind == self.kind and change.layer not in (None, *self.layers):
                return f"it does not adapt layers of the family {change.layer!r}"
            if change.tied:
                return f"{key!r} is one parameter with {change.tied[0]!r}, and PEFT would change one of the two"
        if not mine:
            return f"nothing in it is {self.kind}"
        return Copies.cannot(adapter, set(mine)) or self.cannot_also(mine)

    def _mine(self, adapter: Adapter) -> dict[str, Change]:
        return {split_key(k)[0]: c for k, c in adapter.changes.items() if c.variant.kind == self.kind}

    def write(self, adapter: Adapter, shapes: Shapes = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        mine = self._mine(adapter)
        suffix = {part: suffix for suffix, part in self.suffixes.items()}
        config: dict[str, Any] = {"peft_type": self.peft_type, "inference_mode": True, "target_modules": sorted(mine)}
        config |= self.config_of(mine)
        found = dict(self.shared(mine))
        for path, change in mine.items():
            for part, tensor in self.tensors(path, change).items():
                found[f"{PREFIX}{path}.{suffix[part]}"] = tensor
        with_bias = {**config, "bias": "none"}
        for key, t in Copies.write(adapter, with_bias, set(mine)).items():
            found[PREFIX + key] = t
        fields.put(config, "modules_to_save", with_bias.get("modules_to_save"), None)
        fields.put(config, "bias", with_bias["bias"], "none")
        fields.write_facts(config, adapter)
        return config, found


def rank_of(config: Mapping[str, Any], path: str, field: str = "r", default: int = 8) -> int:
    """The rank of a module: its own by rank_pattern, else the file's."""
    return int(pattern_value(config.get("rank_pattern") or {}, path, config.get(field, default))[0])


def alpha_of(config: Mapping[str, Any], path: str, field: str, default: float = 8) -> Any:
    """The alpha of a module: its own by alpha_pattern, else the file's."""
    return pattern_value(config.get("alpha_pattern") or {}, path, config.get(field, default))[0]


def common(values: Mapping[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and patterns for the paths that have another."""
    if not values:
        return default, {}
    most = Counter(values.values()).most_common(1)[0][0]
    return most, pattern_keys({p: v for p, v in values.items() if v != most}, list(values))


def ranks_and_alphas(changes: Mapping[str, Change], rank: str, alpha: str) -> dict[str, Any]:
    """The fields for ranks and alphas (numerators of alpha/rank), with patterns where modules differ."""
    config: dict[str, Any] = {}
    config[rank], ranks = common({p: c.variant.rank for p, c in changes.items()}, 8)  # type: ignore[attr-defined]
    config[alpha], alphas = common({p: alpha_value(c.variant) for p, c in changes.items()}, 8)
    fields.put(config, "rank_pattern", ranks, {})
    fields.put(config, "alpha_pattern", alphas, {})
    return config


def alpha_value(variant: Any) -> float:
    """A variant's alpha, whole if it is."""
    alpha = 2.0 * variant.rank if variant.alpha is None else float(variant.alpha)
    return int(alpha) if alpha == int(alpha) else alpha


def tucker(core: Tensor, out: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """LyCORIS's Tucker form -> (B (out, r), A (r, in·kernel)).

    core is (r, r, *kernel), out (r, out), inner (r, in); the weight is Σ out[i, p] core[i, j, ...] inner[j, q].
    """
    A = (core.flatten(2).transpose(1, 2) @ inner).transpose(1, 2)  # (r, in, kernel)
    return out.T.contiguous(), A.reshape(core.shape[0], -1)
