"""Fields that every PEFT config has: what is checked, what is only a note, and facts that go in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga")
NUMBERS = ("r", "lora_alpha", "lora_dropout", "alpha")


def check(config: Mapping[str, Any], unsupported: Mapping[str, str]) -> list[str]:
    """Refuse fields that change what the adapter does and are not understood. Returns what should be said.

    Raises:
        AdapterError: such a field is set, or a number is none.
    """
    for field, meaning in unsupported.items():
        if config.get(field):
            raise AdapterError(f"{field} in the config means {meaning}: this cannot be read")
    for field in NUMBERS:
        value = config.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise AdapterError(f"{field}={value!r} in the config is no number")
    for field in ("rank_pattern", "alpha_pattern"):
        check_patterns(config, field)
    init = config.get("init_lora_weights", config.get("init_weights"))
    if isinstance(init, str) and init.lower().startswith(REWRITES_BASE):
        raise AdapterError(
            f"the adapter was started by {init!r}, which rewrites the base, and saved without the conversion: over the "
            f"plain base it means something else. Save it again from PEFT with "
            f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return []


def check_patterns(config: Mapping[str, Any], field: str) -> None:
    """rank_pattern and alpha_pattern: {regular expression: number}."""
    from deltaw.io.peft.claims import checked_pattern

    value = config.get(field)
    if value is None:
        return
    if not isinstance(value, dict) or any(
        isinstance(v, bool) or not isinstance(v, (int, float)) for v in value.values()
    ):
        raise AdapterError(f"{field} in the config must map patterns to numbers")
    for pattern in value:
        checked_pattern(pattern)


def put(config: dict[str, Any], field: str, value: Any, default: Any) -> None:
    """Write a field only if it says something."""
    if value != default:
        config[field] = value


def base_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the base: its name and revision."""
    found = {}
    for ours, field in (("name", "base_model_name_or_path"), ("revision", "revision")):
        value = config.get(field)
        if isinstance(value, str) and value:
            found[ours] = value
    return found


def extra_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a config that travel with the adapter."""
    task = config.get("task_type")
    return {"task_type": task} if task in TASKS else {}


def write_facts(config: dict[str, Any], adapter: Adapter) -> None:
    """The inverse of `base_of` and `extra_of`."""
    for ours, field in (("name", "base_model_name_or_path"), ("revision", "revision")):
        put(config, field, adapter.base.get(ours), None)
    put(config, "task_type", adapter.extra.get("task_type"), None)
