"""Sketch of a weight: its norm and eight seeded random projections. Two weights at relative distance d have sketches at about d.

So a quantised weight is compared with its original without having it (a Johnson-Lindenstrauss projection with signs).
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = 8
CHUNK = 4096
SEED = b"deltaw fingerprint 1"


def sketch(tensor: Tensor) -> list[float]:
    """The norm and `PROJECTIONS` random projections of a tensor, each divided by the norm.

    The random signs are a product of one sign per chunk and one per place in a chunk, both from SHAKE-256, so that they
    are the same on every machine and cost no memory. Two tensors at relative distance d have sketches at about d.
    """
    flat = tensor.detach().reshape(-1).to("cpu", torch.float32)
    n = flat.numel()
    chunks = max(1, -(-n // CHUNK))
    outer, inner = signs(b"outer", chunks), signs(b"inner", CHUNK)
    sums = torch.zeros(PROJECTIONS, dtype=torch.float64)
    squares = 0.0
    for first in range(0, chunks, 256):
        part = flat[first * CHUNK : (first + 256) * CHUNK]
        if part.numel() % CHUNK:
            part = nn.functional.pad(part, (0, -part.numel() % CHUNK))
        part = part.view(-1, CHUNK)
        squares += float(torch.linalg.vector_norm(part, dim=1).double().square().sum())
        sums += ((part @ inner).double() * outer[first : first + part.shape[0]]).sum(0)
    norm = squares**0.5
    return [norm, *(sums / (norm or 1.0)).tolist()]


_signs: dict[tuple[bytes, int], Tensor] = {}


def signs(what: bytes, count: int) -> Tensor:
    """(count, PROJECTIONS) of ±1, the same everywhere."""
    size = 1 << (count - 1).bit_length()
    found = _signs.get((what, size))
    if found is None:
        bits = hashlib.shake_256(SEED + what).digest(size * PROJECTIONS // 8)
        table = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
        each = (table[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        found = each.reshape(size, PROJECTIONS).float() * 2 - 1
        if size <= 1 << 20:
            _signs[what, size] = found
    return found[:count]


def distance(one: Any, other: Any) -> float:
    """About ‖W - V‖ / ‖W‖, from two sketches."""
    try:
        a, b = [float(v) for v in one], [float(v) for v in other]
    except (TypeError, ValueError):
        return float("inf")
    if len(a) != len(b) or len(a) != PROJECTIONS + 1:
        return float("inf")
    if a[0] == 0 or b[0] == 0:
        return 0.0 if a[0] == b[0] else float("inf")
    ratio = b[0] / a[0]
    squares = sum((x - y * ratio) ** 2 for x, y in zip(a[1:], b[1:])) / PROJECTIONS
    return float(max(squares**0.5, abs(ratio - 1)))
