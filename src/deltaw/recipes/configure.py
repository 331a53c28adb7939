"""From YAML and `key=value` to a checked RunConfig. Known words of other trainers are taken; unknown ones are errors.

Order, later wins: the general defaults, the recipe's, the file's, the command line's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import yaml

from deltaw.core.registry import variants
from deltaw.errors import ConfigError, UnknownName, did_you_mean
from deltaw.recipes.recipe import Recipe, recipes
from deltaw.training.config import DataConfig, RunConfig, Section, check, check_method_sections
from deltaw.training.methods import known_methods

ALIASES = {
    "task": "recipe",
    "r": "lora.rank",
    "rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "dropout": "lora.dropout",
    "lora_dropout": "lora.dropout",
    "target_modules": "targets",
    "lora_target_modules": "targets",
    "lora_target": "targets",
    "modules_to_save": "train",
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset": "data",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "accumulate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "learning_rate": "lr",
    "loraplus_lr_ratio": "b_ratio",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "logging_steps": "log_every",
    "dataloader_num_workers": "workers",
    "early_stopping_patience": "patience",
    "additional_target": "train",
    "lora_modules_to_save": "train",
    "base_model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "model_name": "model",
    "model_revision": "revision",
    "revision_of_model": "revision",
    "dataset_name": "data",
    "dataset_path": "data",
    "train_file": "data",
    "dataset_text_field": "data.text",
    "dataset_split": "data.split",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "max_samples": "data.limit",
    "max_train_samples": "data.limit",
    "train_batch_size": "batch_size",
    "lr_scheduler": "schedule",
    "gradient_clipping": "clip",
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "init_lora_weights": "lora.init",
    "packing": "sft.packing",
    "sample_packing": "sft.packing",
}
"""Word of PEFT, TRL, axolotl or LLaMA-Factory -> ours."""

SWITCHES: dict[str, dict[str, Any]] = {
    "use_dora": {"method": "dora"},
    "use_rslora": {"lora": {"scaling": "alpha/sqrt(rank)"}},
    "lora_target_linear": {"targets": "all-linear"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "load_in_8bit": {"quantize": "int8"},
    "load_in_4bit": {"quantize": "nf4"},
}
"""Their switches -> what we say where one is on; off, they say nothing."""

CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "finetuning_type": {"lora": {"method": "lora"}, "full": {"method": "full"}, "freeze": {"method": "head"}},
    "adapter": {"lora": {"method": "lora"}, "qlora": {"method": "lora", "quantize": "nf4"}},
}
"""Their choices -> ours."""

ELSEWHERE = {
    "output_dir": "the folder is an option of the command: --out DIR",
    "overwrite_output_dir": "replacing a folder is an option of the command: --overwrite",
    "resume_from_checkpoint": "a run goes on with `deltaw resume DIR`",
    "max_steps": "the length of a run is counted in epochs=",
    "warmup_steps": "warm-up is a share of all steps: warmup=0.1",
    "eval_steps": "evaluations are counted per epoch: evaluations=2",
    "optim": "the optimizer is AdamW; lr=, weight_decay=, clip= and schedule= are its settings",
    "optimizer": "the optimizer is AdamW; lr=, weight_decay=, clip= and schedule= are its settings",
    "gradient_checkpointing": "it is not needed for the batch to fit: a micro-batch that does not is halved by itself",
    "datasets": "give one source: data=FILE, FOLDER or hub id",
    "device": "the first GPU is taken if there is one; CUDA_VISIBLE_DEVICES= chooses, ACCELERATE_USE_CPU=1 takes none",
    "train_on_inputs": "the loss counts the answers only",
}
"""Words that other trainers have a key for, and what takes their place here."""

INNER = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "text_column": "text",
    "label_column": "label",
}
"""The same, inside sections."""

NAMES = re.compile(r"[A-Za-z_][\w.\-]*(,[A-Za-z_][\w.\-]*)+")
"""targets=q_proj,v_proj: several plain names in one text (a regex with a comma has other signs as well)."""
NOTHING = ("", "null", "~")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def load(source: str, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of `source`, a recipe's name or a YAML file, with `key=value` overrides.

    flags: values given as options of the command line; those that are None are left out.

    Raises:
        ConfigError: an unknown recipe or key, a value of the wrong kind, an unreadable file.
    """
    given: dict[str, Any] = {}
    if source in recipes:
        given["recipe"] = source
    elif Path(source).suffix in (".yaml", ".yml") or Path(source).is_file():
        _merge(given, read_yaml(Path(source)), source)
    else:
        raise UnknownName(
            f"unknown recipe {source!r}{did_you_mean(source, [n for n, _ in recipes.items()])} (see `deltaw recipes`; a configuration file ends in .yaml)"
        )
    lay_over(given, overrides)
    _merge(given, {k: v for k, v in (flags or {}).items() if v is not None}, "the command line")
    if "recipe" not in given:
        raise ConfigError(
            f"{source}: no `recipe:` says which task this is; known: {', '.join(n for n, _ in recipes.items())}"
        )
    return build(given)


def overridden(nested: Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    """A nested configuration with `key=value` laid over it."""
    given = dict(nested)
    lay_over(given, overrides)
    return build(given)


def lay_over(given: dict[str, Any], overrides: Iterable[str]) -> None:
    """Lay every `key=value` over `given`."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} is not of the form key=value")
        name = key.strip().lstrip("-")
        _merge(given, _dotted(name, as_text(value) if takes_text(name) else parse(value)), text)


def build(given: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from canonical, nested values: the recipe's defaults below them, every section checked."""
    recipe = recipes[str(given["recipe"])]
    nested: dict[str, Any] = {}
    _merge(nested, recipe.defaults, recipe.name)
    _merge(nested, given, "the configuration")
    targets = nested.get("targets")
    if isinstance(targets, str) and NAMES.fullmatch(targets):
        nested["targets"] = targets.split(",")
    data = nested.get("data")
    nested["data"] = check(
        DataConfig, {"path": data} if isinstance(data, str) else _mapping("data", data or {}), "data."
    )
    options = check(recipe.options, _mapping(recipe.name, nested.pop(recipe.name, {})), f"{recipe.name}.")
    known = {*RunConfig.model_fields} - {"methods", "options"}
    sections: dict[str, dict[str, Any]] = {}
    for key in [k for k in nested if k not in known]:
        if key in ELSEWHERE:
            raise ConfigError(f"unknown key {key!r}: {ELSEWHERE[key]}")
        if key not in variants:
            every = [*known, recipe.name, *(n for n, _ in variants.items()), *ALIASES, *SWITCHES, *CHOICES]
            raise ConfigError(
                f"unknown key {key!r}{did_you_mean(key, every)} (see `deltaw config schema {recipe.name}`)"
            )
        sections[key] = _mapping(key, nested.pop(key))
    check_method_sections(sections.items())
    if isinstance(rates := nested.get("lr"), Mapping):
        _check_rates(rates)
    return check(RunConfig, {**nested, "methods": sections, "options": options.model_dump()})  # type: ignore[no-any-return]


def _check_rates(rates: Mapping[str, Any]) -> None:
    """Refuse a learning rate of a method that does not exist."""
    known = [*known_methods(), "default"]
    for name in rates:
        if name not in known:
            raise ConfigError(f"unknown key 'lr.{name}'{did_you_mean(name, known)} (known here: {', '.join(known)})")


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe that a configuration names."""
    return recipes[config.recipe]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping; a key that comes twice is an error."""
    try:
        found = plain(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ConfigError(f"no such file: {path}{near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return _mapping(str(path), _coerced(found if found is not None else {}))


def parse(text: str) -> Any:
    """The value of `key=value`: YAML, with 1e-4 as a number."""
    try:
        return _coerced(plain(text))
    except yaml.YAMLError:
        return text


def takes_text(key: str) -> bool:
    """Whether the value of `key` is a text whatever it looks like: a path, a column, a name."""
    outer, _, inner = ALIASES.get(key, key).partition(".")
    outer = ALIASES.get(outer, outer)
    section: type[Section] = RunConfig
    if outer == "data":
        section, inner = DataConfig, INNER.get(inner, inner) or "path"
    elif inner:
        section = recipes[outer].options if outer in recipes else Section
    else:
        inner = outer
    if inner not in section.model_fields:
        return False
    kind = section.model_fields[inner].annotation
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return all(each in (str, NoneType) or get_origin(each) is Literal for each in kinds)


def as_text(value: str) -> Any:
    """`value` as it is typed, unless it is quoted, null, or a section in braces."""
    return parse(value) if value.strip() in NOTHING or value.strip()[0] in "'\"{" else value.strip()


def plain(text: str) -> Any:
    """What a YAML text says, in numbers, texts, lists and mappings only."""
    return _Once(text).get_single_data()  # type: ignore[no-untyped-call]


class _Once(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _coerced(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text: here it is a number."""
    if isinstance(value, dict):
        return {k: _coerced(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_coerced(v) for v in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _dotted(key: str, value: Any) -> dict[str, Any]:
    """ "a.b", 1 -> {"a": {"b": 1}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: keys with values are expected here, found {value!r}")
    return {str(k): v for k, v in value.items()}


def _translated(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`values` with the switches and choices of other trainers in our words."""
    for word, value in values.items():
        if word in SWITCHES and isinstance(value, bool):
            yield from (SWITCHES[word] if value else {}).items()
        elif word in CHOICES and value in CHOICES[word]:
            yield from CHOICES[word][value].items()
        else:
            yield word, value


def _merge(into: dict[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Lay `values` over `into`, with canonical names. A section's keys are merged one by one.

    Raises:
        ConfigError: two names of the same key are given at once.
    """
    named: dict[str, str] = {}
    for word, value in _translated(values):
        key = ALIASES.get(str(word), str(word))
        inside = value if isinstance(value, Mapping) else ()
        within = {f"{key}.{INNER.get(str(k), str(k))}": f"{word}: {k}" for k in inside}
        if len(within) < len(inside):
            raise ConfigError(f"{where}: {word}: {', '.join(map(str, inside))} name one key twice: give one")
        for name, said in {key: str(word), **within}.items():
            if named.setdefault(name, said) != said:
                raise ConfigError(f"{where}: {said!r} and {named[name]!r} are both names of {name!r}: give one")
        outer, _, inner = key.partition(".")
        if inner:
            value = {inner: value}
        if outer == "data" and isinstance(value, str):
            value = {"path": value}
        if isinstance(value, Mapping):
            section = into.get(outer)
            section = dict(section) if isinstance(section, Mapping) else {}
            section.update({INNER.get(str(k), str(k)): v for k, v in value.items()})
            into[outer] = section
        else:
            into[outer] = value
