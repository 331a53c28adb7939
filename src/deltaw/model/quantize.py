"""Quantize: keep frozen weights in another form (8 bit, 4 bit, 16 bit), and have them back.

Only weights that nobody trains. The products of forward and of the input gradient run on the kept form. The originals
are kept only if asked for: without them there is a way back to the weights that the codes stand for, none to the bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.core.frozen import Form, FrozenWeight, foreign_dense
from deltaw.core.host import Host
from deltaw.errors import ConfigError, ModelError, NonFinite, TargetError
from deltaw.model import state, targeting, ties
from deltaw.model.changing import changing
from deltaw.model.gradients import listed
from deltaw.model.one_roster import froze, note_frozen, one_roster
from deltaw.model.originals import Keep, OriginalsFile
from deltaw.model.placing import watch
from deltaw.ops.choices import Choices


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight: bytes before and after, and ‖kept - original‖ / ‖original‖."""

    key: str
    form: Form
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did. `skipped`: parameter name -> why it was left as it is. `kept_bytes`: cost of kept originals."""

    weights: tuple[QuantizedWeight, ...]
    skipped: Mapping[str, str]
    kept_bytes: int

    def __str__(self) -> str:
        before, after = sum(w.before for w in self.weights), sum(w.after for w in self.weights)
        worst = max(self.weights, key=lambda w: w.error)
        left = (
            f"; left as they are: {listed([f'{k} ({why})' for k, why in self.skipped.items()])}" if self.skipped else ""
        )
        return (
            f"{len(self.weights)} weights as {self.weights[0].form}: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB, "
            f"relative error at most {worst.error:.2%} ({worst.key}); originals kept: {self.kept_bytes / 2**20:.1f} MiB{left}"
        )


@dataclass
class Quantized:
    """What `dequantize` needs of one parameter. `original`: itself, or None if it is in `file` or not kept at all."""

    trained_before: bool
    original: nn.Parameter | None = None
    file: OriginalsFile | None = None

    @property
    def kept(self) -> bool:
        """Whether the original can be had back."""
        return self.original is not None or self.file is not None


@changing
def quantize(
    model: nn.Module,
    form: Form,
    *,
    targets: Any = targeting.ALL_LINEAR,
    exclude: Any = (),
    keep: Keep = None,
    choices: Choices | None = None,
) -> QuantizeReport:
    """Keep the frozen weights of the layers that `targets` names in `form`, before or after adapters are attached.

    targets, exclude: as for `attach`; default: every linear layer but the output head.
    keep: the originals, for `dequantize`: "memory", "file" (a temporary safetensors file, gone with the model, with
        `dequantize` or with the process), or None.
    choices: the record of the kernels that the products run on; left out, a new one, which times nothing.

    A weight whose outliers the form cannot hold, that is trained (it requires a gradient in a model with adapters, or an adapter trains a copy of it) or that
    several layers share is left as it is; the report says which. In a model without adapters what is quantised counts as frozen.

    Raises:
        TargetError: a target matches nothing, a layer that cannot compute with a form, or only weights that are left.
        ConfigError: an option is wrong, or the form cannot hold a weight.
        NonFinite: a weight holds NaN or infinity.
        ModelError: changes are merged into the weights, or a weight is on the meta device.
    If anything is wrong, the model is left as it was.
    """
    if keep not in ("memory", "file", None):
        raise ConfigError(f"keep={keep!r} is not one of 'memory', 'file', None")
    if not isinstance(form, Form):
        raise ConfigError(f"quantize takes a form such as dw.Int8(), not {form!r}")
    root = state.unwrap(model)
    state.unmerged(root, "quantize")
    state.unsharded(root, "quantize")
    layers = wanted(root, targets, exclude)
    tied = ties.shared(state.parameters_of(targeting.layers_of(root)))
    trains = bool(state.names(root))
    skipped: dict[str, str] = {}
    ready: list[tuple[str, nn.Module, type[Host], FrozenWeight]] = []
    lines: list[QuantizedWeight] = []
    for path, layer in layers.items():
        key = join_key(path, "weight")
        why = left_alone(layer, tied, trains)
        if why is not None:
            skipped[key] = why
            continue
        cls = layer.host if isinstance(layer, Host) else targeting.host_for(layer)
        assert cls is not None
        kept = in_form(form, key, layer, cls)
        why = form.objection(cls.to_matrix(layer, "weight", weight_of(layer).detach()), kept)  # type: ignore[arg-type]
        if why is not None:
            skipped[key] = why
            continue
        ready.append((path, layer, cls, kept))
        lines.append(line(key, layer, cls, kept))
    if not ready:
        raise TargetError(f"nothing to quantize: {listed([f'{k} ({why})' for k, why in skipped.items()])}")

    layout = state.Layout(root)
    roster = one_roster(layout, "quantize")
    file = None
    if keep == "file":
        file = OriginalsFile.of({join_key(p, "weight"): weight_of(layer).data.contiguous() for p, layer, _, _ in ready})
    choices = Choices() if choices is None else choices
    for path, layer, cls, kept in ready:
        kept.name = join_key(path, "weight")
        if kept.choices is not None:
            kept.choices = choices
        host = layer if isinstance(layer, Host) else cls.of(layer, roster)
        swap_in(host, kept, keep, file)
    watch(layout, roster)
    cost = sum(w.before for w in lines) if keep == "memory" else 0
    return QuantizeReport(tuple(lines), skipped, cost)


def kernel_choices(model: nn.Module) -> Choices | None:
    """The record of the kernels that the model's quantised weights run on, or None if there is nothing to choose."""
    for _, host in state.hosts(state.unwrap(model)):
        form = host.form_of("weight")
        if form is not None and form.choices is not None:
            return form.choices
    return None


def wanted(root: nn.Module, targets: Any, exclude: Any) -> dict[str, nn.Module]:
    """The layers to quantise by path, each once; containers that a target also matches are passed over."""
    known = targeting.layers_of(root)
    left = [p for t in (targeting.as_targets(exclude) if exclude else []) for p in targeting.matching(root, t, known)]
    found: dict[int, str] = {}
    for target in targeting.as_targets(targets):
        for path in targeting.matching(root, target, known, left):
            layer = known[path]
            cls = targeting.host_for(layer)
            read_only = targeting.belongs_to_parent(path, known)
            if cls is not None and (cls.takes_forms or cls.foreign) and not read_only:
                found.setdefault(id(layer), path)
            elif target != targeting.ALL_LINEAR and layer._parameters:
                raise TargetError(
                    f"{targeting.describe(target)} matches {path!r}, a {type(layer).__name__}, which computes with a plain "
                    "weight only: linear layers can be quantised"
                )
    if not found:
        raise TargetError(f"targets={targets!r} names no linear layer of {type(root).__name__} that can be quantised")
    return {path: known[path] for path in found.values()}


def left_alone(layer: nn.Module, tied: Mapping[Hashable, list[ties.Place]], trains: bool) -> str | None:
    """Why the weight of `layer` is not to be quantised, or None.

    tied: the parameters that several layers of the model share. trains: the model has adapters, so that what requires a
    gradient is trained.
    """
    if isinstance(layer, Host):
        if layer.form_of("weight") is not None:
            return "quantised already"
        copies = [n for n in layer.adapters._modules if "weight" in layer.deltas(n)]
        if any(layer.deltas(n)["weight"].variant.any_shape for n in copies):
            return "an adapter trains a copy of it"
    weight = weight_of(layer)
    if foreign_dense(layer, weight) is not None:
        return "another library keeps it quantised"
    if weight.requires_grad and trains:
        return "it is trained"
    if not weight.is_floating_point():
        return f"it is {weight.dtype} already"
    if ties.others(tied, layer, "weight"):
        return "another layer shares it"
    return None


def in_form(form: Form, key: str, layer: nn.Module, cls: type[Host]) -> FrozenWeight:
    """The weight of `layer` in `form`, checked."""
    weight = weight_of(layer)
    if weight.is_meta:
        raise ModelError(f"cannot quantize {key!r}: it is on the meta device; load the model's weights first")
    if not bool(torch.isfinite(weight).all()):
        raise NonFinite(f"cannot quantize {key!r}: it holds NaN or infinity; reload the base model")
    return form.keep(cls.to_matrix(layer, "weight", weight.detach()))  # type: ignore[arg-type]


def line(key: str, layer: nn.Module, cls: type[Host], kept: FrozenWeight) -> QuantizedWeight:
    """The report on one weight."""
    matrix = cls.to_matrix(layer, "weight", weight_of(layer).detach()).float()  # type: ignore[arg-type]
    size = float(torch.linalg.vector_norm(matrix))
    error = float(torch.linalg.vector_norm(kept.dense().float() - matrix)) / size if size else 0.0
    stored = weight_of(layer)
    return QuantizedWeight(key, kept.form, stored.numel() * stored.element_size(), kept.nbytes, error)


def swap_in(host: Host, kept: FrozenWeight, keep: Keep, file: OriginalsFile | None) -> None:
    """Put the form in the weight's place; deltas that cache something of the weight look again."""
    weight = weight_of(host)
    trained_before = weight.requires_grad or "weight" in froze(host)
    kept.record = Quantized(trained_before, weight if keep == "memory" else None, file)
    host.hold_form("weight", kept)
    prepare(host)


def prepare(host: Host) -> None:
    """Let the deltas of a host cache anew what they need of its weight."""
    for name in host.adapters._modules:
        for site, delta in host.deltas(name).items():
            if not delta.variant.any_shape:
                delta.prepare(host.frozen_matrix(site))


@changing
def dequantize(model: nn.Module, into: Literal["original", "dense"] = "original") -> nn.Module:
    """Have plain weights again: the kept originals, bit for bit, or with into="dense" those that the codes stand for.

    After a `model.to(dtype)` they are rounded to the model's dtype of now.

    Raises:
        ModelError: nothing is quantised, the originals were not kept or their file is gone, or changes are merged into the
            weights.
    If anything is wrong, the model is left as it was.
    """
    if into not in ("original", "dense"):
        raise ConfigError(f"into={into!r} is not one of 'original', 'dense'")
    layout = state.Layout(model)
    state.unmerged_in(layout.rosters(), "dequantize")
    layout.unsharded("dequantize")
    forms = [(path, host, host.form_of("weight")) for path, host in layout.hosts()]
    held = [(path, host, form) for path, host, form in forms if form is not None]
    if not held:
        raise ModelError("nothing is quantised")
    gone = [join_key(path, "weight") for path, _, form in held if not form.record.kept]
    if into == "original" and gone:
        raise ModelError(
            f"the originals of {len(gone)} weights were not kept ({listed(gone)}): quantize with keep='memory' or 'file', "
            "or pass into='dense' for the weights that the codes stand for"
        )
    roster = one_roster(layout, "dequantize")
    files = {} if into == "dense" else read_all(form.record for _, _, form in held)
    for _, host, form in held:
        host.hold_form("weight", None, restored(host, form, into, files))
        prepare(host)
    if not roster.names:
        for _, host in layout.hosts():
            host.release_layer()
    return model


def read_all(records: Iterable[Quantized]) -> dict[OriginalsFile, dict[str, Tensor]]:
    """What is in the files of these records, all read before anything changes."""
    otherwise = "load the base model again, or pass into='dense' for the weights that the codes stand for"
    return {file: file.read(otherwise) for file in {r.file for r in records} if file is not None}


def restored(
    host: Host, form: FrozenWeight, into: str, files: Mapping[OriginalsFile, Mapping[str, Tensor]]
) -> nn.Parameter:
    """The plain parameter again, requiring a gradient if it did and no adapter is there for which it is frozen."""
    before: Quantized = form.record
    device, dtype = form.codes.device, form.dtype
    if into == "dense":
        parameter = nn.Parameter(host.from_matrix("weight", form.dense()).contiguous(), False)
    elif before.original is not None:
        parameter = before.original
        parameter.data = parameter.data.to(device, dtype)
    else:
        assert before.file is not None
        parameter = nn.Parameter(files[before.file][form.name].to(device, dtype), False)
    adapted = bool(host.roster.names)
    if adapted and before.trained_before:
        note_frozen(host, "weight", host.roster)
    parameter.requires_grad_(before.trained_before and not adapted)
    return parameter


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The plain weight of a layer."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight
