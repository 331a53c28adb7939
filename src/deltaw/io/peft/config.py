"""Fields that every PEFT config has: what is checked, what is only a note, and facts that go in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
FROM_BASE = ("pissa", "olora")
"""Starts that follow from the base alone: `load` takes them away. `pissa_niter_N` does not, which PEFT draws at random."""
KNOWN = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
        "runtime_config",
        "enable_lora",
        "merge_weights",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "init_weights",
        "decompose_both",
        "decompose_factor",
        "rank_dropout_scale",
        "feedforward_modules",
        "init_ia3_weights",
        "projection_prng_key",
        "save_projection",
        "vera_dropout",
        "d_initial",
        "target_r",
        "init_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "token_indices",
    ]
)
"""Fields of PEFT's configs. The others are named in a notice: nobody can say here what they mean."""
NUMBERS = ("r", "lora_alpha", "lora_dropout", "alpha", "rank_dropout", "module_dropout", "vera_dropout", "d_initial")
FLAGS = (
    "use_rslora",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "inference_mode",
    "ensure_weight_tying",
    "merge_weights",
    "use_effective_conv2d",
    "decompose_both",
    "rank_dropout_scale",
    "save_projection",
    "init_ia3_weights",
)
TEXTS = ("bias", "base_model_name_or_path", "revision", "task_type", "peft_version")
MAX_PATTERNS = 10_000


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
    for fields, kind, word in ((FLAGS, bool, "neither true nor false"), (TEXTS, str, "no text")):
        for field in fields:
            if config.get(field) is not None and not isinstance(config[field], kind):
                raise AdapterError(f"{field}={config[field]!r} in the config is {word}")
    modes = ("none", "all", "lora_only", f"{str(config.get('peft_type')).lower()}_only")
    if config.get("bias") is not None and config["bias"] not in modes:
        raise AdapterError(f"bias={config['bias']!r} in the config is none of {', '.join(dict.fromkeys(modes))}")
    if not isinstance(config.get("init_lora_weights"), (bool, str, type(None))):
        raise AdapterError(f"init_lora_weights={config['init_lora_weights']!r} in the config is no name of a start")
    for field in ("rank_pattern", "alpha_pattern"):
        check_patterns(config, field)
    start = start_of(config)
    if start is not None and start not in FROM_BASE:
        why = "a random sketch of it" if start.startswith("pissa") else "what training saw"
        raise AdapterError(
            f"the adapter was started by {start!r}, which rewrites the base by {why}, and saved without the "
            f"conversion: over the plain base it means something else. Save it again from PEFT with "
            f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    unknown = sorted(k for k, v in config.items() if v and k not in KNOWN and not k.startswith("_"))
    if unknown:
        return [f"the config has fields that are not known here, and are ignored: {', '.join(unknown[:6])}"]
    return []


def start_of(config: Mapping[str, Any]) -> str | None:
    """The name of a start that rewrote the base, or None."""
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) and start.lower().startswith(REWRITES_BASE) else None


def check_patterns(config: Mapping[str, Any], field: str) -> None:
    """rank_pattern and alpha_pattern: {regular expression: number}, or AdaLoRA's {name: [which directions are kept]}."""
    from deltaw.io.peft.claims import checked_pattern

    value = config.get(field)
    if value is None:
        return
    kept = config.get("peft_type") == "ADALORA" and field == "rank_pattern"
    if not isinstance(value, dict) or any(
        isinstance(v, bool) or not isinstance(v, (int, float, list) if kept else (int, float)) for v in value.values()
    ):
        raise AdapterError(f"{field} in the config must map patterns to numbers")
    if len(value) > MAX_PATTERNS:
        raise AdapterError(f"{field} in the config holds {len(value):,} patterns; at most {MAX_PATTERNS:,} are read")
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
