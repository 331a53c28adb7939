"""`RunConfig`: everything that a run can be told, checked once, at the file boundary.

One flat table of keys plus sections: `data.*`, one section per method (`lora.rank`) and one per recipe (`mnist.source`).
Sections of methods are checked against the method's own dataclass, so a new variant brings its options along.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltaw.core.registry import variants
from deltaw.core.variant import Variant
from deltaw.errors import ConfigError, did_you_mean

Rate = Annotated[float, Field(gt=0)]
SEEDS = 2**63 - 1
"""The largest seed, with room for one more per process (torch takes 64 bits)."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, `true` is not a number, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the examples come from and which columns matter."""

    path: str | None = Field(
        None, description="jsonl, csv, tsv, json or parquet file, folder with train/validation/test files, or hub id"
    )
    text: str = Field("text", description="column of the text, or of the picture")
    label: str = Field("label", description="column of the class")
    split: str | None = Field(None, description="take only this split of the source and split it ourselves")
    revision: str | None = Field(None, description="revision of a hub data set")
    validation: float = Field(
        0.1, gt=0, lt=1, description="share held out to choose the best epoch, where the source has none"
    )
    test: float = Field(0.1, ge=0, lt=1, description="share held out for the last word, where the source has none")
    limit: int | None = Field(None, gt=0, description="use at most so many training examples")


class RunConfig(Section):
    """One training run. Keys that a recipe does not set keep these defaults."""

    recipe: str = Field(description="the task: see `deltaw recipes`")
    method: str = Field(
        "lora", description="lora, dora, ... (`lora:4` sets the rank), head (frozen body), full, or base (no training)"
    )
    model: str | None = Field(None, description="pretrained base: hub id or folder")
    revision: str | None = Field(None, description="revision of a hub model")
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_construct(), description="the examples")
    targets: str | list[str] = Field("all-linear", description="layers to adapt: names, a regex, or all-linear")
    train: list[str] | None = Field(
        None, description="modules trained in full; left out: those that the base does not have yet"
    )
    max_length: int = Field(128, gt=0, description="longest text, in tokens")
    base_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout inside the base while training; left out: the model's own"
    )

    quantize: str | None = Field(
        None, description="form of the frozen weights: int8 (two to three times as fast on a CPU), nf4, dense16"
    )

    seed: int = Field(0, ge=0, le=SEEDS, description="of everything random")
    epochs: int = Field(3, gt=0, description="passes over the training examples")
    batch_size: int = Field(32, gt=0, description="examples per process and forward pass")
    accumulate: int = Field(1, gt=0, description="forward passes per optimizer step")
    eval_batch_size: int = Field(64, gt=0, description="examples per forward pass in evaluation")
    lr: Rate | dict[str, Rate] = Field(5e-4, description="learning rate, or one per method")
    b_ratio: float = Field(1.0, gt=0, description="learning rate of B over that of A (LoRA+)")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps over which the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls after warm-up")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    evaluations: int = Field(1, gt=0, description="evaluations per epoch")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision")
    compact: bool = Field(
        False, description="keep what the forward saves for backward in 16 bit: the same loss, less memory"
    )
    bucket: bool = Field(True, description="batches of similar length: the same result for less padding")
    cache_prefix: bool = Field(True, description="compute what is frozen below every trained weight once per example")
    workers: int = Field(0, ge=0, description="processes that load examples")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights are the result")
    patience: int | None = Field(None, gt=0, description="stop after so many epochs without a better score")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0: after every epoch")
    keep_checkpoints: int = Field(2, ge=0, description="checkpoints kept; 0: none are written")
    log_every: int = Field(20, gt=0, description="steps between lines of metrics.jsonl")
    report_to: str | list[str] = Field(
        default_factory=list, description="tensorboard, wandb, mlflow, trackio (one or several), all or none"
    )

    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options of each method, in its own section"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the recipe's own options, in a section named as the recipe"
    )

    def lr_for(self, method: str) -> float:
        """The learning rate of `method` ("lora:4" counts as "lora")."""
        if not isinstance(self.lr, dict):
            return self.lr
        name = method.partition(":")[0]
        if name in self.lr:
            return self.lr[name]
        if "default" in self.lr:
            return self.lr["default"]
        raise ConfigError(
            f"lr has no value for method {name!r} (it has {', '.join(self.lr)}): add lr.{name}= or lr.default="
        )

    def nested(self) -> dict[str, Any]:
        """The configuration as it is written in a file: sections by name, nothing that is only internal."""
        plain = self.model_dump(mode="json")
        sections = plain.pop("methods")
        own = plain.pop("options")
        plain.update(sections)
        if own:
            plain[self.recipe] = own
        return plain

    def digest(self) -> str:
        """sha256 of all that decides the result of training; resuming under another digest is refused."""
        relevant = {k: v for k, v in self.nested().items() if k not in IRRELEVANT}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


IRRELEVANT = {"checkpoint_every", "keep_checkpoints", "log_every", "report_to", "eval_batch_size", "workers"}
"""Keys that may change between a run and its continuation."""


def check(section: type[Section], values: Mapping[str, Any], where: str = "") -> Any:
    """`values` as a `section`, or one message that names every key that is wrong.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value of the wrong kind.
    """
    known = section.model_fields
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {where + str(key)!r}{did_you_mean(str(key), known)} (known here: {', '.join(sorted(known))})"
            )
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_explained(where, error.errors()))) from None


def _explained(where: str, errors: Sequence[Any]) -> list[str]:
    """One sentence for each value; of a union, what each member wanted of it, unless one member found fault inside it."""
    found: dict[str, dict[str, list[str]]] = {}
    for error in errors:
        place = where + ".".join(str(part) for part in error["loc"] if not _is_type_name(part))
        said = found.setdefault(place, {}).setdefault(f"{place}={error['input']!r}", [])
        said.append(error["msg"][:1].lower() + error["msg"][1:])
    again = "input should be "
    return [
        f"{said}: {' or '.join(whys).replace(f' or {again}', ' or ')}"
        for place, each in found.items()
        if not any(other.startswith(f"{place}.") for other in found)
        for said, whys in each.items()
    ]


def _is_type_name(part: Any) -> bool:
    """Pydantic names the member of a union that it tried; a reader of the message needs the key only."""
    return isinstance(part, str) and (part in {"float", "constrained-float", "int", "str"} or "[" in part)


def method_variant(config: RunConfig, method: str | None = None) -> Variant:
    """The variant that `method` ("lora", "dora:16", ...) stands for, with the options of its section.

    A method whose class extends another's (DoRA extends LoRA) takes that one's section first, so `lora.rank=4` is the
    rank of both unless `dora.rank` says otherwise.
    """
    name, colon, rank = (method or config.method).partition(":")
    cls = variants[name]
    known = {f.name for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    for ancestor in reversed(cls.__mro__):
        kind = ancestor.__dict__.get("kind")
        if isinstance(kind, str):
            options.update({k: v for k, v in config.methods.get(kind, {}).items() if k in known})
    if colon:
        if not rank.isdecimal():
            raise ConfigError(f"method {name}:{rank}: after the colon comes a rank, for example {name}:8")
        options["rank"] = int(rank)
    if "rank" in options and "rank" not in known:
        raise ConfigError(f"method {name!r} has no rank; its options: {', '.join(sorted(known))}")
    return cls(**options)  # type: ignore[no-any-return]


def check_method_sections(sections: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse an option that the method of its section does not have."""
    for name, options in sections:
        known = {f.name for f in dataclasses.fields(variants[name])}
        for key in options:
            if key not in known:
                raise ConfigError(
                    f"unknown key '{name}.{key}'{did_you_mean(key, known)} (known here: {', '.join(sorted(known))})"
                )
