"""Where a run writes: looked at before anything is loaded, because hours later is too late to hear of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from deltaw.errors import ConfigError


def check_place(folder: Path) -> None:
    """Make sure that `folder` is, or can become, a folder that can be written to. Leaves nothing behind.

    Raises:
        ConfigError: it is a file, lies under one, or its disk or folder takes no files from us.
    """
    there = folder
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            what = "a file" if there.is_file() else "no folder"
            raise ConfigError(f"nothing can be kept in {folder}: {there} is {what}; choose another --out")
        with tempfile.TemporaryDirectory(prefix=".deltaw-", dir=there) as probe:
            if there != folder:  # the names that are still to be made, which may be too long for the disk
                (Path(probe) / folder.relative_to(there)).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"nothing can be kept in {folder}: {there} refuses it ({error.strerror or error}); choose another --out"
        ) from error
