"""Adapters that PEFT started by PiSSA or OLoRA and saved as they were: over the plain base they mean s·(BA - B₀A₀).

PEFT takes the start s·B₀A₀ out of the base, again at every load. It follows from the base's weight alone: PiSSA's is the
nearest matrix of rank r, OLoRA's is s times the first r columns and rows of a QR decomposition. Here the base stays as it
is, and the adapter gets the factors [A; A₀] and [B, -B₀].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change
from deltaw.core.base_weights import base_weight
from deltaw.errors import AdapterError


def without_start(model: nn.Module, adapter: Adapter, start: str) -> Adapter:
    """`adapter` as a change of the plain base of `model`.

    Raises:
        AdapterError: a changed layer is none that PEFT starts in this way.
    """
    changes = dict(adapter.changes)
    for key, change in adapter.changes.items():
        if "A" not in change.tensors or "B" not in change.tensors:
            continue
        W = base_weight(model, key, change)
        if W.ndim != 2 or W.is_meta:
            raise AdapterError(f"{key!r}: a start by {start!r} can be taken away from plain matrices with weights only")
        A0, B0 = factors(W.float(), change, start)
        A, B = change.tensors["A"], change.tensors["B"]
        tensors = {
            **change.tensors,
            "A": torch.cat([A, A0.to(A.dtype)]),
            "B": torch.cat([B, -B0.to(B.dtype)], dim=1),
        }
        changes[key] = Change(doubled(change.variant), tensors, change.layer, change.shape, change.tied)
    return adapter.replace(changes=changes)


def doubled(variant: Any) -> Any:
    """The same scale at twice the rank."""
    if variant.scaling == "alpha/rank":
        alpha = 2 * variant.rank if variant.alpha is None else variant.alpha
        return replace(variant, rank=2 * variant.rank, alpha=2 * alpha)
    return replace(variant, rank=2 * variant.rank, alpha=variant.scale, scaling="alpha")


def factors(W: Tensor, change: Change, start: str) -> tuple[Tensor, Tensor]:
    """A₀ (rank, in) and B₀ (out, rank), such that PEFT took s·B₀A₀ out of W (out, in)."""
    v: Any = change.variant
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        return R[: v.rank], Q[:, : v.rank]
    U, S, Vh = torch.linalg.svd(
        W, full_matrices=False
    )  # as PEFT: in full, since a sketch would leave a part in the base
    root = (S[: v.rank] / v.scale).sqrt()
    return root[:, None] * Vh[: v.rank], U[:, : v.rank] * root
