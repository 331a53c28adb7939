"""What a PEFT config says about a model: which modules it targets. Checked against the model, so that nothing is missing.

PEFT reads such a config and silently gives every target that has no tensor a fresh adapter, that is: none. Here a target
without tensors is an error. Patterns come from files of others and run as regular expressions: their size is bounded, and
those that can take exponential time are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.errors import AdapterError
from deltaw.io.pattern import pattern

PLAIN = re.compile(r"\w+")
"""A pattern that is a name."""
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains in full for a task type, whether or not the config names them."""


@dataclass(frozen=True)
class Claims:
    """The targeting fields of a PEFT config."""

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    """Modules to save that must be there if the model has them, named by the config or implied by the task type."""
    parameters: tuple[str, ...] = ()
    """`target_parameters`: parameters that are adapted wherever their module is."""
    ties: bool = False
    """`ensure_weight_tying`: a layer that shares its parameter with a targeted one is adapted with it."""
    bias: str = "none"
    """Which biases are trained in full: "all", or "lora_only", those of adapted layers."""

    @staticmethod
    def of(config: Mapping[str, Any]) -> Claims:
        """Read them, checking types and patterns."""
        layers = config.get("layers_to_transform")
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = [layers]
        if layers is not None and not (isinstance(layers, list) and all(type(n) is int for n in layers)):
            raise AdapterError(f"layers_to_transform={layers!r} in the config is no list of whole numbers")
        save = names(config, "modules_to_save")
        if isinstance(save, str):
            raise AdapterError(f"modules_to_save={save!r} in the config must be a list")
        targets = names(config, "target_modules")
        exclude = names(config, "exclude_modules")
        patterns = names(config, "layers_pattern")
        for text in [targets, exclude]:
            if isinstance(text, str):
                checked_pattern(text)
        patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
        for text in patterns:
            if not pattern(text).simple:
                raise AdapterError(f"layers_pattern {text[:80]!r} in the config: too many repeats for a name")
        parameters = names(config, "target_parameters")
        if isinstance(parameters, str):
            raise AdapterError(f"target_parameters={parameters!r} in the config must be a list")
        heads = HEADS.get(str(config.get("task_type")), ())
        return Claims(
            targets,
            exclude,
            save or (),
            tuple(layers) if layers else None,
            patterns,
            (*(save or ()), *heads),
            parameters or (),
            config.get("ensure_weight_tying") is True,
            config.get("bias") or "none",
        )

    @property
    def everywhere(self) -> bool:
        """Whether its targets are names, meant in every block."""
        return isinstance(self.target_modules, tuple) and self.layers is None and self.exclude_modules is None

    def saves(self, path: str) -> bool:
        """Whether a module on the way to `path` is saved in full (as PEFT: any whose path ends with the name)."""
        parts = path.split(".")
        return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1) for name in self.expected)

    def adapts(self, key: str) -> bool:
        """Whether the config accounts for a change of the parameter `key`, or does not say what it targets."""
        unsaid = not self.target_modules or str(self.target_modules).lower() == "all-linear"
        return unsaid or self.names(key) or self.targets(key.rpartition(".")[0])

    def names(self, key: str) -> bool:
        """Whether `target_parameters` names the parameter `key`."""
        return any(key == name or key.endswith(f".{name}") for name in self.parameters)

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`, given a class that it can adapt."""
        return self.left_out_by(path) is None

    def left_out_by(self, path: str) -> tuple[str, Any] | None:
        """The field of the config, and what it says, by which PEFT does not adapt the module at `path`; None if it does."""
        if not _listed(self.target_modules, path):
            return "target_modules", self.target_modules
        if _listed(self.exclude_modules, path):
            return "exclude_modules", self.exclude_modules
        if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", path) for m in self.expected):
            return "modules_to_save", self.expected
        if self.layers is None or isinstance(self.target_modules, str) or self._number(path) in self.layers:
            return None
        return "layers_to_transform", self.layers

    def _number(self, path: str) -> int | None:
        """The number of the block in which a module lies, as `layers_pattern` finds it."""
        for name in self.layers_pattern or (r"[^.]*",):
            before = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
            found = re.match(rf"{before}{name}\.(?P<idx>\d+)\.", path)
            if found:
                return int(found.group("idx"))
        return None


def _listed(wanted: str | tuple[str, ...] | None, path: str) -> bool:
    if not wanted:
        return False
    if isinstance(wanted, str):
        return pattern(wanted).fullmatch(path)
    return path in wanted or any(path.endswith("." + name) for name in wanted)


def names(config: Mapping[str, Any], field: str) -> str | tuple[str, ...] | None:
    """A field that is null, a text or a list of texts."""
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise AdapterError(f"{field} in the config must be a text or a list of texts, found {str(value)[:80]}")
    return tuple(value)


def checked_pattern(text: str) -> str:
    """`text`, if it is a regular expression that can be matched in bounded time."""
    if not (PLAIN.fullmatch(text.replace(".", "")) and len(text) < 1000):
        pattern(text)
    return text


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> tuple[Any, list[str]]:
    """PEFT's rule: the first pattern (in the file's order) that matches a dotted end of `path`; and all that match."""
    hits = [key for key in patterns if path.endswith(ending(key)) and pattern(key).matches_end(path)]
    return (patterns[hits[0]] if hits else default), hits


@functools.lru_cache(maxsize=1 << 16)
def ending(text: str) -> str:
    """What every path that the pattern matches ends with, as far as it is plain to see."""
    return text.rpartition(".")[2] if PLAIN.fullmatch(text.replace(".", "")) else ""


def pattern_keys(wanted: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Patterns that give each path of `wanted` its value and match no other path, whatever their order."""
    found = {}
    for path, value in wanted.items():
        plain = re.fullmatch(r"[\w.]+", path) is not None
        alone = plain and all(p == path or not re.match(rf"(.*\.)?({path})$", p) for p in paths)
        found[path if alone else "^" + re.escape(path)] = value
    return found
