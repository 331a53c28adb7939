"""Several conversations in one row, none of which sees another: positions restart and attention is block-diagonal.

Packing is a function of the lengths alone: the longest first, each into the first row with room (first-fit decreasing,
at most 22 % more rows than the best packing). Rows then hold nearly no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.training.chat_tokens import IGNORED, Tokens

OPEN = 64
"""Rows kept open at once, so that packing stays linear in the number of conversations."""


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `lengths`, grouped into rows of at most `size` tokens; every index exactly once, rows in a fixed order.

    Raises:
        ValueError: one of them is longer than a row.
    """
    if lengths and max(lengths) > size:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into rows of {size}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (row, room left)
    for i in order:
        place = next((k for k, (_, room) in enumerate(open_rows) if room >= lengths[i]), None)
        if place is None:
            rows.append([i])
            open_rows.append((len(rows) - 1, size - lengths[i]))
            open_rows = open_rows[-OPEN:]
        else:
            row, room = open_rows[place]
            rows[row].append(i)
            open_rows[place] = (row, room - lengths[i])
    return rows


def collate(rows: Sequence[Sequence[Tokens]], pad: int) -> dict[str, Tensor]:
    """Rows of conversations as tensors, (batch, width) each.

    input_ids, labels; position_ids: counted from the start of each conversation; segments: 1, 2, ... for the
    conversations of a row, 0 for padding. The label of a conversation's first token is IGNORED: nothing predicts it.
    """
    width = max(sum(len(t.ids) for t in row) for row in rows)
    shape = (len(rows), width)
    found = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "segments": torch.zeros(shape, dtype=torch.long),
    }
    for b, row in enumerate(rows):
        start = 0
        for number, one in enumerate(row, 1):
            end = start + len(one.ids)
            found["input_ids"][b, start:end] = torch.tensor(one.ids)
            found["labels"][b, start:end] = torch.tensor([IGNORED, *one.labels[1:]])
            found["position_ids"][b, start:end] = torch.arange(len(one.ids))
            found["segments"][b, start:end] = number
            start = end
    return found


def may_see(segments: Tensor) -> Tensor:
    """(batch, width) -> (batch, 1, width, width): True where a token (row) may look at another (column).

    Itself and earlier ones of its own conversation. Padding sees padding, so that no row is empty (softmax over nothing
    is NaN).
    """
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]
