"""Shapes in these tests are small: the fused operation runs on them all the same."""

from __future__ import annotations

import pytest

from deltaw.ops import select


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    """No shape is so small that torch's own operations are composed instead."""
    for limit in ("SMALL", "LIGHT", "FORMED"):
        monkeypatch.setattr(select, limit, -1)
    return "fused"
