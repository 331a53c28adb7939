"""The configuration described: a JSON schema for editors, and a commented file for people. Both come from the models."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from deltaw.core.registry import variants
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.config import DataConfig, RunConfig, Section

INTERNAL = {"methods", "options"}


def json_schema(recipe: str | None = None) -> dict[str, Any]:
    """The schema of a configuration file: general keys, `data`, a section per method, the recipe's own."""
    schema = RunConfig.model_json_schema()
    properties = schema["properties"]
    for name in INTERNAL:
        properties.pop(name)
    properties["recipe"]["enum"] = [name for name, _ in recipes.items()]
    properties["data"] = {
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataConfig"}],
        "description": "path, or a section",
    }
    for name, cls in variants.items():
        options = {f.name: _option(f) for f in dataclasses.fields(cls)}
        properties[name] = {
            "type": "object",
            "properties": options,
            "additionalProperties": False,
            "description": (cls.__doc__ or "").partition("\n")[0],
        }
    if recipe is not None:
        own = recipes[recipe].options.model_json_schema()
        schema.setdefault("$defs", {}).update(own.pop("$defs", {}))
        properties[recipe] = own
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    return {} if field.default is dataclasses.MISSING else {"default": field.default}


def commented(recipe: str) -> str:
    """A configuration file of `recipe` with its defaults, every key explained."""
    known = recipes[recipe]
    config = build({"recipe": recipe})
    lines = [
        f"# {known.name}: {known.about}",
        f"# Run it: deltaw train {recipe}.yaml        Compare methods: deltaw compare {recipe}.yaml",
        "",
    ]
    for name, field in RunConfig.model_fields.items():
        if name in INTERNAL:
            continue
        lines.append(f"# {field.description}")
        if name == "data":
            lines += _section("data", config.data, DataConfig)
        else:
            lines.append(_line(name, getattr(config, name)))
    if known.options.model_fields:
        lines += [
            "",
            "# this recipe's own options",
            *_section(recipe, known.options.model_validate(config.options), known.options),
        ]
    variant = variants["lora"]
    lines += ["", "# options of the method lora (others: their own section, named as the method)", "lora:"]
    lines += [f"  {_line(f.name, f.default)}" for f in dataclasses.fields(variant)]
    return "\n".join(lines) + "\n"


def _section(name: str, values: Section, cls: type[Section]) -> list[str]:
    lines = [f"{name}:"]
    for key, field in cls.model_fields.items():
        lines += [f"  # {field.description}", f"  {_line(key, getattr(values, key))}"]
    return lines


def _line(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, default_flow_style=True, width=1000).strip()[1:-1]
