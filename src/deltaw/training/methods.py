"""What a method trains: everything (`full`), the new modules (`head`), nothing (`base`), or an adapter (any variant).

Returns the tools to keep the result: adapters are kept as adapters, a fully trained model as a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from deltaw.core.registry import forms, variants
from deltaw.core.variant import Variant
from deltaw.errors import ConfigError, UnknownName, did_you_mean
from deltaw.model.attach import attach
from deltaw.model.quantize import QuantizeReport, quantize
from deltaw.ops.choices import Choices
from deltaw.training.config import RunConfig, method_variant
from deltaw.training.schedule import steps
from deltaw.training.task import Task

WHOLE = {
    "full": "every weight of the model",
    "head": "the new modules only, on a frozen body",
    "base": "nothing: the model as it is",
}
"""Methods that are no variant."""


@dataclass(frozen=True)
class Prepared:
    """A model made ready for training. `adapter`: its name, or None where the whole model (or nothing) is trained."""

    adapter: str | None
    trains: bool


def known_methods() -> dict[str, str]:
    """Every method with a phrase about it."""
    found = dict(WHOLE)
    for name, cls in variants.items():
        if name not in found:
            found[name] = (cls.__doc__ or "").partition("\n")[0]
    return found


def check_method(config: RunConfig) -> None:
    """Refuse a method that does not exist or whose options are wrong, before anything is loaded.

    Raises:
        UnknownName, ConfigError: see the message.
    """
    name, colon, _ = config.method.partition(":")
    if config.quantize is not None and config.quantize not in forms:
        raise UnknownName(
            f"quantize={config.quantize!r}: no such form{did_you_mean(config.quantize, [k for k, _ in forms.items()])} "
            f"(known: {', '.join(k for k, _ in forms.items())})"
        )
    if config.quantize is not None and name == "full":
        raise ConfigError(f"quantize={config.quantize} with method 'full': every weight is trained, none is frozen")
    if config.compact and name == "base":
        raise ConfigError("compact=true with method 'base': nothing is trained, so nothing is saved for a backward")
    if config.compact and config.precision != "no":
        raise ConfigError(
            f"compact=true with precision={config.precision}: what is saved is 16 bit already; choose one of the two"
        )
    if name in WHOLE:
        if colon:
            raise ConfigError(f"method {config.method!r}: {name!r} has no rank")
        return
    if name not in variants:
        raise UnknownName(
            f"unknown method {name!r}{did_you_mean(name, known_methods())} (known: {', '.join(known_methods())})"
        )
    method_variant(config)


def prepare(model: nn.Module, task: Task, config: RunConfig, world: int = 1) -> Prepared:
    """Attach or unfreeze what the method trains; everything else is frozen. world: number of processes.

    Raises:
        ConfigError: a module that was filled at random is not among those that are trained in full. Others as `attach`.
    """
    name = config.method.partition(":")[0]
    new = config.train if config.train is not None else task.new_modules(model)
    if name == "full":
        model.requires_grad_(True)
        return Prepared(None, True)
    if name == "base":
        model.requires_grad_(False)
        return Prepared(None, False)
    _check_drawn(model, task, new)
    if name == "head":
        if not new:
            raise ConfigError(
                "method 'head' has nothing to train: the base brings all its modules; name some with train=[...]"
            )
        attach(model, {target: variants["full"]() for target in new})
        return Prepared("default", True)
    targets = task.targets() if config.targets == "all-linear" and task.targets() is not None else config.targets
    batch = config.batch_size * config.accumulate * world
    _, total = steps(len(task.splits["train"]), batch, config.epochs)
    attach(model, planned(method_variant(config), total), targets, train=new)
    return Prepared("default", True)


def _check_drawn(model: nn.Module, task: Task, trained: Sequence[str]) -> None:
    """Refuse a result that lacks a module which the base lacks as well. trained: dotted suffixes of modules or parameters."""
    drawn = [
        path
        for path in task.drawn_modules()
        for name, _ in model.get_submodule(path).named_parameters()
        if not any(f".{suffix}." in f".{path}.{name}." for suffix in trained)
    ]
    if drawn:
        raise ConfigError(
            f"train=[{','.join(trained)}] leaves out {' and '.join(dict.fromkeys(drawn))}, new in this model and filled "
            "at random: neither trained nor kept, so that no base would fit the result; add it, or leave train out"
        )


def parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Numbers in the parameters of `model`, or in those that are trained.

    Asked of the plain model, before adapters and copies of trained modules join it, this is what `full` trains, and
    what a run's share of trained parameters is a share of.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def quantize_base(model: nn.Module, config: RunConfig) -> QuantizeReport | None:
    """Keep the frozen weights of a prepared model in the form that the run asks for; kernels are timed and recorded."""
    if config.quantize is None:
        return None
    return quantize(model, forms[config.quantize](), choices=Choices(timed=True))


def planned(variant: Variant, total: int) -> Variant:
    """`variant` with the number of the run's optimizer steps, if it has an option `total` that was left open."""
    options = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    if "total" in options and options["total"] is None:
        return dataclasses.replace(variant, total=total)  # type: ignore[call-arg]
    return variant
