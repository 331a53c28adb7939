"""Merge: write W + ΔW into the weights, report what rounding did, and go back to the very bits.

A merged weight is a new tensor put in the place of the old one (`parameter.data`), which is kept, never recovered by
subtraction. So `unmerge` is exact in any dtype, and a base that must not be written to (a memory map) is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.core.host import Host
from deltaw.core.roster import Active, Roster
from deltaw.errors import ConfigError, ModelError, NonFinite
from deltaw.model import state
from deltaw.model.activate import Choice, chosen
from deltaw.model.targeting import layers_of
from deltaw.model.ties import refuse_one_sided

Keep = Literal["memory", "file"] | None


@dataclass(frozen=True)
class MergedWeight:
    """What merging did to one parameter.

    largest: largest |ΔW|. rounding: largest |stored - exact| of the merged weight; relative: ‖stored - exact‖ / ‖ΔW‖.
    unmoved: share of the entries with ΔW ≠ 0 whose stored value did not move.
    """

    key: str
    dtype: str
    largest: float
    rounding: float
    relative: float
    unmoved: float


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did, weight by weight; `kept_bytes` is the cost of the originals that are kept for `unmerge`."""

    names: tuple[str, ...]
    weights: tuple[MergedWeight, ...]
    kept_bytes: int

    def __str__(self) -> str:
        worst = max(self.weights, key=lambda w: w.relative)
        return (
            f"merged {', '.join(self.names)} into {len(self.weights)} weights; "
            f"largest change {max(w.largest for w in self.weights):.3g}, "
            f"rounding at most {max(w.rounding for w in self.weights):.3g}, "
            f"{worst.relative:.2%} of the change in {worst.key} ({worst.dtype}), "
            f"entries that did not move at most {max(w.unmoved for w in self.weights):.1%}; "
            f"originals kept: {self.kept_bytes / 2**20:.1f} MiB"
        )


@dataclass
class Merged:
    """What `unmerge` needs: the originals, in memory or in a file."""

    names: tuple[str, ...]
    originals: dict[str, Tensor] = field(default_factory=dict)
    file: Path | None = None
    final: bool = False


def merge(
    model: nn.Module,
    names: Choice = None,
    keep: Keep = "memory",
    into: Literal["dequantized", "original"] = "dequantized",
) -> MergeReport:
    """Write the changes of `names` (default: the active adapters) into the weights, rounding once to their dtype.

    keep: where the originals go for `unmerge`: "memory" (costs as much as the merged weights; the report says how
        much), "file" (a temporary safetensors file, removed by `unmerge`), or None (merged for good).
    into: for a quantised weight, the form of the result: "dequantized" or "original" (quantised again).

    Raises:
        ModelError: something is merged already, no adapter speaks, or a weight is on the meta device.
        NonFinite: a weight or a change holds NaN or infinity; nothing is merged then.
        UnknownName: the model has no adapter of that name.
    """
    if keep not in ("memory", "file", None):
        raise ConfigError(f"keep={keep!r} is not one of 'memory', 'file', None")
    if into not in ("dequantized", "original"):
        raise ConfigError(f"into={into!r} is not one of 'dequantized', 'original'")
    root = state.unwrap(model)
    state.unmerged(root, "merge")
    every = state.rosters(root)
    if not every:
        raise ModelError("nothing to merge: the model carries no adapter")
    active = every[0].active() if names is None else chosen(root, names)
    if not active:
        raise ModelError("nothing to merge: no adapter is active; name one, dw.merge(model, 'name')")
    results = [(key, host, site, new) for key, host, site, new in changed_weights(root, active, every)]
    if not results:
        raise ModelError(f"nothing to merge: {[n for n, _ in active]} change no weight")

    merged = Merged(tuple(n for n, _ in active), final=keep is None)
    report = []
    originals: dict[str, Tensor] = {}
    for key, host, site, (_new, line) in results:
        report.append(line)
        originals[key] = host.parameter(site).data
    if keep == "file":
        with tempfile.NamedTemporaryFile(prefix="deltaw-originals-", suffix=".safetensors", delete=False) as handle:
            merged.file = Path(handle.name)
        save_file({k: t.contiguous() for k, t in originals.items()}, merged.file)
    elif keep == "memory":
        merged.originals = originals
    for _, host, site, (new, _) in results:
        host.parameter(site).data = new
    for roster in every:
        roster.merged = merged
    cost = sum(t.numel() * t.element_size() for t in originals.values()) if keep == "memory" else 0
    return MergeReport(merged.names, tuple(report), cost)


def changed_weights(
    model: nn.Module, active: Active, rosters: Sequence[Roster]
) -> Iterator[tuple[str, Host, str, tuple[Tensor, MergedWeight]]]:
    """(name, host, site, (new stored tensor, report line)) of every parameter that the active adapters change."""
    refuse_one_sided(layers_of(model), active)
    hosts = list(state.hosts(model))
    seen: set[int] = set()
    with torch.no_grad(), undropped(host for _, host in hosts):
        for path, host in hosts:
            with host.roster.using(active):
                for site in sorted(host.active_sites()):
                    one = id(host.parameter(site))
                    if one not in seen:  # a tied parameter is merged once
                        seen.add(one)
                        yield join_key(path, site), host, site, merged_weight(join_key(path, site), host, site)


@contextmanager
def undropped(hosts: Iterable[Host]) -> Iterator[None]:
    """Within the context the changes of `hosts` are whole, whatever their mode: no rank or module dropout is merged."""
    before = {m: m.training for host in hosts for m in host.adapters.modules()}
    for module in before:
        module.training = False
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def merged_weight(key: str, host: Host, site: str) -> tuple[Tensor, MergedWeight]:
    """The new stored tensor of one site with its line of the report."""
    stored = host.parameter(site)
    if stored.is_meta:
        raise ModelError(f"cannot merge into {key!r}: the base is on the meta device; load its weights first")
    if not stored.is_floating_point():
        new = host.changed(site)
        return new.clone(), MergedWeight(key, str(stored.dtype).removeprefix("torch."), 0.0, 0.0, 0.0, 0.0)
    if not bool(torch.isfinite(stored).all()):
        raise NonFinite(f"cannot merge: base weight {key!r} holds NaN or infinity; reload the base model")
    exact = host.changed(site, dtype=torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise NonFinite(f"cannot merge: the change of {key!r} holds NaN or infinity; the adapter is damaged")
    new = exact.to(stored.dtype).contiguous().clone()
    delta = exact - stored.to(exact.dtype)
    rounding = new.to(exact.dtype) - exact
    size = float(torch.linalg.vector_norm(delta))
    wanted = delta != 0
    unmoved = float(((new == stored) & wanted).sum()) / max(1, int(wanted.sum()))
    line = MergedWeight(
        key,
        str(stored.dtype).removeprefix("torch."),
        float(delta.abs().max()) if delta.numel() else 0.0,
        float(rounding.abs().max()) if delta.numel() else 0.0,
        float(torch.linalg.vector_norm(rounding)) / size if size else 0.0,
        unmoved,
    )
    return new, line


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit.

    Raises:
        ModelError: nothing is merged, or it was merged with keep=None.
    """
    root = state.unwrap(model)
    found = [r for r in state.rosters(root) if r.merged is not None]
    if not found:
        raise ModelError("nothing is merged")
    merged: Merged = found[0].merged
    if merged.final:
        raise ModelError("merged with keep=None: the originals are gone; load the base model again")
    originals = load_file(merged.file) if merged.file is not None else merged.originals
    for path, host in state.hosts(root):
        for site in {*host._parameters, *host._buffers}:
            key = join_key(path, site)
            if key in originals:
                here = host.parameter(site)
                here.data = originals[key].to(here.device)
    for roster in found:
        roster.merged = None
    if merged.file is not None:
        merged.file.unlink(missing_ok=True)
    return model


@contextmanager
def merged(model: nn.Module, names: Choice = None) -> Iterator[MergeReport]:
    """Within the context, the changes of `names` (default: the active adapters) are merged into the weights."""
    report = merge(model, names)
    try:
        yield report
    finally:
        unmerge(model)
