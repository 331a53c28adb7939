"""What a model carries and what training it costs: `summary` (a table) and `adapters` (a list)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.model import state

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

    activation_bytes: what a training forward keeps for its backward; None unless `summary` was given inputs.
    matched: adapter -> {pattern: number of modules that it matched}, for adapters that were attached here.
    """

    rows: tuple[Row, ...]
    total: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None = None
    matched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Weights + gradients + optimizer + activations, as far as known: what a training step holds at its peak."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + (self.activation_bytes or 0)

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
                + ("" if self.activation_bytes is None else f", activations {self.activation_bytes / mib:,.1f} MiB"),
            ]
        )


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def activation_bytes(model: nn.Module, inputs: Any) -> int:
    """Bytes that one training forward of `model` on `inputs` keeps for its backward, each storage counted once.

    inputs: a tensor, a tuple of positional or a mapping of keyword arguments. The forward is run, in the model's mode;
    its randomness is given back to the generator.
    """
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        total = sum(kept.values())
        del output
    return total


def summary(model: nn.Module, inputs: Any = None) -> Summary:
    """What every adapter changes, how much of the model is trained, and what that costs in memory (`print` it).

    inputs: an example batch (tensor, tuple or mapping); with it, one forward measures the activations too.
    """
    root = state.unwrap(model)
    rows = []
    for path, host in state.hosts(root):
        for name in host.roster.names:
            for site, delta in host.deltas(name).items():
                size = sum(t.numel() for t in delta.state_dict().values())
                trainable = any(p.requires_grad for p in delta.parameters())
                shape = tuple(host.parameter(site).shape)
                rows.append(Row(join_key(path, site), host.family, shape, name, repr(delta.variant), size, trainable))
    parameters = list(root.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(nbytes(t) for t in (*parameters, *root.buffers()))
    gradients = sum(nbytes(p) for p in trained)
    return Summary(
        tuple(rows),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        weights,
        gradients,
        ADAM_STATES * gradients,
        None if inputs is None else activation_bytes(model, inputs),
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
