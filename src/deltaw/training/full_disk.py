"""A full disk while a plain model is written: safetensors has an error of its own for it, which is none of the system's."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

NUMBER = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the context a model is written into `folder`, which is removed if that fails.

    Raises:
        OSError: the disk is full or unwritable.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        told = NUMBER.search(str(error)) if isinstance(error, SafetensorError) else None
        if told is None:
            raise
        free = shutil.disk_usage(folder.parent).free
        raise OSError(
            int(told[1]),
            f"{os.strerror(int(told[1]))}: the model cannot be written to {folder.parent}, {free:,} bytes are free on "
            "its disk: make room, then do it again",
        ) from error
