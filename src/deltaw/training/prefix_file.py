"""Rows of tensors in a file without a name, one read per row: memory holds only what the system chooses to keep of it.

The file has no name, so that it is gone with the process however that ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

LARGEST = 8 << 30
"""Bytes that such a file may take at most."""


class PrefixFile:
    """Append rows, read them in any order. The file is made in `folder` with the first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.end = 0
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None

    def reserve(self, size: int) -> None:
        """Refuse, as OSError, to start what will not fit."""
        if size > LARGEST:
            raise OSError(f"its outputs would take {size / 2**30:.1f} GiB, more than {LARGEST / 2**30:.0f}")
        free = shutil.disk_usage(self.folder).free
        if size > free // 2:
            raise OSError(f"its outputs would take {size / 2**30:.1f} GiB of the {free / 2**30:.1f} free on the disk")

    def write(self, tensors: Sequence[Tensor]) -> int:
        """Append one row; returns where it begins."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # type: ignore[assignment]  # noqa: SIM115
        assert self._file is not None
        start = self.end
        for tensor in tensors:
            self.end += self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return start

    def read(self, start: int, kept: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """The tensors, of these shapes and dtypes, of the row that begins at `start`."""
        assert self._file is not None
        self._file.flush()
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kept]
        raw = bytearray(sum(sizes))
        done = 0
        while done < len(raw):
            got = os.preadv(self._file.fileno(), [memoryview(raw)[done:]], start + done)
            if got == 0:
                raise OSError("the recorded prefix ends early")
            done += got
        found, at = [], 0
        for (shape, dtype), size in zip(kept, sizes):
            found.append(torch.frombuffer(raw, dtype=dtype, count=size // dtype.itemsize, offset=at).view(shape))
            at += size
        return found

    def close(self) -> None:
        """Give the space back."""
        if self._file is not None:
            self._file.close()
            self._file = None
