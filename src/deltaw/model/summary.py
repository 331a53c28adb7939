"""What a model carries and what training it costs: `summary` (a table) and `adapters` (a list)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deltaw.core.adapter import join_key
from deltaw.model import state
from deltaw.model.peak import LIBRARIES, Peak, measured

ADAM_STATES = 2
"""Tensors that Adam keeps per parameter, in the parameter's dtype."""


@dataclass(frozen=True)
class Row:
    """One changed parameter."""

    key: str
    layer: str
    shape: tuple[int, ...]
    adapter: str
    variant: str
    parameters: int
    trainable: bool


@dataclass(frozen=True)
class Status:
    """One adapter of a model. `weight` is None while it does not speak in the calling thread."""

    name: str
    kinds: tuple[str, ...]
    weights: int
    parameters: int
    trainable: bool
    weight: float | None
    merged: bool

    @property
    def active(self) -> bool:
        """Whether it speaks now, in the calling thread."""
        return self.weight is not None


@dataclass(frozen=True)
class Summary:
    """Every change, and totals. Memory in bytes: weights, gradients and Adam's two states of what is trainable.

    activation_bytes: what a training forward holds for its backward, and its output; peak_bytes: what training on such
    inputs takes above the loaded model at its peak (within 15 %); both None unless `summary` was given inputs.
    matched: adapter -> {pattern: number of modules that it matched}, for adapters that were attached here.
    """

    rows: tuple[Row, ...]
    total: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None = None
    peak_bytes: int | None = None
    matched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """What training holds, as far as known: weights and peak, or weights, gradients and the optimizer's state."""
        above = self.gradient_bytes + self.optimizer_bytes if self.peak_bytes is None else self.peak_bytes
        return self.weight_bytes + above

    @property
    def share(self) -> float:
        """Trainable parameters / all parameters."""
        return self.trainable / max(1, self.total)

    def patterns(self) -> list[str]:
        """What the patterns of each adapter matched, a line for each adapter."""
        return [
            f"{name}: " + ", ".join(f"{p} matched {n} module{'' if n == 1 else 's'}" for p, n in found.items())
            for name, found in self.matched.items()
        ]

    def __str__(self) -> str:
        head = ("weight", "layer", "shape", "adapter", "variant", "parameters")
        lines = [
            (
                r.key,
                r.layer,
                "x".join(map(str, r.shape)),
                r.adapter,
                r.variant,
                f"{r.parameters:,}{'' if r.trainable else ' frozen'}",
            )
            for r in self.rows
        ]
        wide = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, wide)).rstrip() for line in [head, *lines]]
        mib = 2**20
        return "\n".join(
            [
                *table,
                *self.patterns(),
                f"trainable {self.trainable:,} of {self.total:,} parameters ({self.share:.2%})",
                f"memory: weights {self.weight_bytes / mib:,.1f} MiB, gradients {self.gradient_bytes / mib:,.1f} MiB, "
                f"Adam {self.optimizer_bytes / mib:,.1f} MiB"
                + ("" if self.activation_bytes is None else f", activations {self.activation_bytes / mib:,.1f} MiB")
                + (
                    "" if self.peak_bytes is None else f"; at its peak {self.peak_bytes / mib:,.0f} MiB above the model"
                ),
            ]
        )


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def step_peak(model: nn.Module, inputs: Any) -> Peak:
    """Memory of one forward and backward pass of `model` on `inputs`, in the model's mode.

    inputs: a tensor, a tuple of positional or a mapping of keyword arguments. What is differentiated is the model's own
    `.loss`, if it returns one, else the sum of all that it returns.
    """

    def loss() -> Tensor:
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        floats = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.stack([t.float().sum() for t in floats]).sum()

    return measured(model, loss)


def training_peak(model: nn.Module, peak: Peak) -> int:
    """What training takes above the loaded model: a step's peak, Adam's state, and on a CPU the libraries' own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = ADAM_STATES * sum(nbytes(p) for p in trained)
    on_cpu = all(p.device.type == "cpu" for p in trained)
    return peak.step + adam + (LIBRARIES if on_cpu else 0)


def summary(model: nn.Module, inputs: Any = None) -> Summary:
    """What every adapter changes, how much of the model is trained, and what that costs in memory (`print` it).

    inputs: an example batch (tensor, tuple or mapping); with it, one forward and backward pass, in the model's mode,
        measures activations and peak too. Gradients, buffers and the random generator stay as they were.
    """
    root = state.unwrap(model)
    rows = []
    for path, host in state.hosts(root):
        for name in host.roster.names:
            for site, delta in host.deltas(name).items():
                size = sum(t.numel() for t in delta.state_dict().values())
                trainable = any(p.requires_grad for p in delta.parameters())
                shape = tuple(host.stored_parameter(site).shape)
                rows.append(Row(join_key(path, site), host.family, shape, name, repr(delta.variant), size, trainable))
    parameters = list(root.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(nbytes(t) for t in (*parameters, *root.buffers()))
    gradients = sum(nbytes(p) for p in trained)
    peak = None if inputs is None else step_peak(model, inputs)
    return Summary(
        tuple(rows),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        weights,
        gradients,
        ADAM_STATES * gradients,
        None if peak is None else peak.forward,
        None if peak is None else training_peak(model, peak),
        {n: notes["matched"] for r in state.rosters(root) for n, notes in r.notes.items() if "matched" in notes},
    )


def adapters(model: nn.Module) -> list[Status]:
    """The adapters of `model` with their status, in the order in which they came."""
    root = state.unwrap(model)
    found = []
    for roster in state.rosters(root):
        active = dict(roster.active())
        merged = set(roster.merged.names) if roster.merged is not None else set()
        for name in roster.names:
            deltas = [d for _, host in state.hosts(root) if host.roster is roster for d in host.deltas(name).values()]
            found.append(
                Status(
                    name,
                    tuple(sorted({d.variant.kind for d in deltas})),
                    len(deltas),
                    sum(t.numel() for d in deltas for t in d.state_dict().values()),
                    any(p.requires_grad for d in deltas for p in d.parameters()),
                    active.get(name),
                    name in merged,
                )
            )
    return found
