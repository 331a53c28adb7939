"""The temporary file in which `merge` and `quantize` keep the original weights, if they are asked to keep them in a file.

It goes with its last owner: when no model needs it any more (used, or dropped), and when the process ends.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaw.errors import ModelError

Keep = Literal["memory", "file"] | None
"""Where the originals go."""


class OriginalsFile:
    """Original weights by name, in a temporary safetensors file.

    Deep copies of a model share it. A pickle knows the file's name only: it neither keeps the file nor deletes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """A new file with `tensors` (contiguous, each with memory of its own); none is left behind if it cannot be written."""
        with tempfile.NamedTemporaryFile(prefix="deltaw-originals-", suffix=".safetensors", delete=False) as handle:
            found = cls(Path(handle.name))
        goes = weakref.finalize(found, removed, found.path, os.getpid())
        try:
            save_file(dict(tensors), found.path)
        except BaseException:
            goes()
            raise
        return found

    def read(self, otherwise: str) -> dict[str, Tensor]:
        """The originals. otherwise: what is left to do without them.

        Raises:
            ModelError: the file is gone.
        """
        try:
            found: dict[str, Tensor] = load_file(self.path)
        except FileNotFoundError:
            raise ModelError(
                f"the originals were kept in {self.path}, which is gone (it goes with the process that wrote it, or with the "
                f"last model there that needs it): {otherwise}"
            ) from None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


def removed(path: Path, process: int) -> None:
    """Delete a file, unless this is a fork of the process that owns it."""
    if os.getpid() == process:
        path.unlink(missing_ok=True)
