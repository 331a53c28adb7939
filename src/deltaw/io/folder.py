"""Folders of adapters: read without following a link, replaced in one step or not at all.

Reading opens the folder once and its files relative to it, never through a symlink, pipe or device; who needs several
files of one writing asks `replaced` when all are open. Writing goes to a temporary sibling, is flushed to the disk, and
takes the place of the old folder by one rename (an exchange, where the system has it): a crash leaves the old folder or
the new one, whole, and a draft that the next writer to the same place removes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

import numpy as np

from deltaw.core.adapter import ALIGNMENT
from deltaw.errors import AdapterError

try:
    import fcntl
except ImportError:  # on Windows this can be imported, but folders cannot be opened
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "deltaw_manifest.json"
CARD = "README.md"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin")
OURS = (CONFIG, WEIGHTS, MANIFEST, CARD)
MAX_TOTAL = 64 << 30
NO_PLACE = (
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
"""What the system says of a path that no folder can be made at."""
Aligned = Callable[[bytes], int] | None


class Folder:
    """The regular files of one folder, opened relative to it. `names` are its entries; `path` is for messages.

    It stays open as long as this lives, so that no other folder can have its number on the disk (`replaced`).
    """

    handle: int | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = named(path)
        try:
            self.handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.names = sorted(os.listdir(self.handle))
        except NotADirectoryError as error:
            raise AdapterError(f"{self.path} is a file; give the folder that holds {CONFIG} and {WEIGHTS}") from error
        except FileNotFoundError as error:
            raise AdapterError(f"there is no folder {self.path}") from error
        except (OSError, ValueError) as error:
            raise AdapterError(f"the folder {str(self.path)[:200]!r} cannot be opened: {error}") from error

    def __del__(self) -> None:
        if self.handle is not None:
            os.close(self.handle)

    def replaced(self) -> bool:
        """Whether another folder, or none, has its name by now: of what was read here, files may have been gone already."""
        if self.handle is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.handle))
        except OSError:
            return True

    def read(self, name: str, max_bytes: int = MAX_TOTAL, aligned: Aligned = None) -> memoryview:
        """`opened(...).read()`: the content of a file directly inside the folder, in memory of its own."""
        return self.opened(name, max_bytes, aligned).read()

    def opened(self, name: str, max_bytes: int = MAX_TOTAL, aligned: Aligned = None, mapped: bool = False) -> Opened:
        """A file directly inside the folder, ready to be read.

        aligned: from the file's first 8 bytes, the place in it that shall lie at a multiple of 64 in memory.
        mapped: it is not read, but mapped into memory.

        Raises:
            AdapterError: it is a link, no regular file, or too large.
        """
        if name not in self.names:
            raise AdapterError(f"{self.path} has no {name}; it has: {', '.join(self.names[:10]) or 'nothing'}")
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.handle)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise AdapterError(
                    f"{self.path / name} is a symbolic link: adapters are read from plain files only; "
                    f"copy the folder with its links resolved (cp -rL)"
                ) from error
            raise AdapterError(f"{self.path / name} cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise AdapterError(f"{self.path / name} is not a regular file")
        return Opened(os.fdopen(file, "rb"), self.path / name, max_bytes, aligned, mapped)


class Opened:
    """A plain file, open, and memory of its `size` in bytes for what is in it, or the file mapped into memory."""

    def __init__(self, stream: BufferedReader, path: Path, max_bytes: int, aligned: Aligned, mapped: bool) -> None:
        self.stream, self.path = stream, path
        try:
            about = os.fstat(stream.fileno())
            self.size = about.st_size
            if not stat.S_ISREG(about.st_mode):
                raise AdapterError(f"{path} is not a regular file")
            if self.size > max_bytes:
                raise AdapterError(f"{path} holds {self.size:,} bytes; at most {max_bytes:,} are read")
            self.mapped = mapped and self.size > 0
            self.data = self._pages() if self.mapped else self._room(aligned)
        except BaseException:
            stream.close()
            raise

    def _pages(self) -> memoryview:
        """The file's own pages; what is written there stays in this process."""
        try:
            return memoryview(mmap.mmap(self.stream.fileno(), self.size, access=mmap.ACCESS_COPY))
        except OSError as error:
            raise AdapterError(f"{self.path} cannot be mapped into memory ({error}): leave mapped out") from error

    def _room(self, aligned: Aligned) -> memoryview:
        """Memory that nobody filled with zeros, as a bytearray would be."""
        room = np.empty(self.size + ALIGNMENT, np.uint8)
        start = 0 if aligned is None else -(room.ctypes.data + aligned(self.stream.peek(8)[:8])) % ALIGNMENT
        return room[start : start + self.size].data

    def read(self) -> memoryview:
        """All of it, once. The file is closed then.

        Raises:
            AdapterError: it changed meanwhile.
        """
        with self.stream:
            if not self.mapped and (self.stream.readinto(self.data) != self.size or self.stream.read(1)):
                raise AdapterError(f"{self.path} changed while it was read; try again")
        return self.data


class Files(Folder):
    """A folder whose files lie elsewhere (the hub's cache links them): `{name: path}`, from a trusted caller."""

    def __init__(self, where: Mapping[str, str | os.PathLike[str]], called: str) -> None:
        self.path = Path(called)
        self.where = {name: Path(p).resolve() for name, p in where.items()}
        self.names = sorted(where)

    def opened(self, name: str, max_bytes: int = MAX_TOTAL, aligned: Aligned = None, mapped: bool = False) -> Opened:
        if name not in self.where:
            raise AdapterError(f"{self.path} has no {name}; it has: {', '.join(self.names)}")
        return Opened(self.where[name].open("rb"), self.path / name, max_bytes, aligned, mapped)


def named(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, or an AdapterError."""
    try:
        return Path(path)
    except TypeError as error:
        raise AdapterError(f"a folder is named by a text or a path, found {type(path).__name__}") from error


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def replace(path: str | os.PathLike[str], fill: Callable[[Path], None]) -> Path:
    """Make the folder `path` be what `fill(empty folder)` writes, atomically; files get the umask's mode.

    An existing folder is replaced if it is empty or an adapter of ours (its README.md is kept, unless `fill` wrote one).

    Raises:
        AdapterError: `path` is something else, holds files that are not an adapter's, or is where nothing can be written.
    """
    target = named(path)
    try:
        exists = _may_replace(target)
        draft, lock = _draft(target)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise AdapterError(
            f"{str(target)[:200]} cannot be written, nor a folder be made beside it: {error.strerror}"
        ) from error
    try:
        _remove_leftovers(target)
        fill(draft)
        if exists and (target / CARD).is_file() and not (draft / CARD).exists():
            shutil.copyfile(target / CARD, draft / CARD)
        for file in sorted(draft.iterdir()):
            sync(file)
        sync(draft)
        if exists:
            exchange(draft, target)
        else:
            os.rename(draft, target)
        sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)
    return target


def _draft(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, and it opened and locked: the lock goes with its process, so one without is dead."""
    while True:
        draft = target.parent / f".{target.name}.tmp-{secrets.token_hex(6)}"
        draft.mkdir(parents=True)
        with suppress(FileNotFoundError):
            lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # a file system without locks, where nobody removes anything either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if draft.exists():  # else another writer took it for a dead one's before it was locked
                return draft, lock
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Remove the drafts of writers to `target` that were killed."""
    with suppress(OSError):
        for draft in target.parent.iterdir():
            if re.fullmatch(re.escape(f".{target.name}.tmp-") + "[0-9a-f]{12}", draft.name):
                with suppress(OSError), _opened(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as handle:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(draft, ignore_errors=True)


def _may_replace(target: Path) -> bool:
    if not target.is_symlink() and not target.exists():
        return False
    if target.is_symlink() or not target.is_dir():
        raise AdapterError(f"{target} exists and is no folder: choose another name")
    names = sorted(os.listdir(target))
    if names and MANIFEST not in names:
        raise AdapterError(
            f"{target} exists and is not an adapter that deltaw wrote (it holds {', '.join(names[:5])}): "
            f"choose another folder, or remove it yourself"
        )
    foreign = [n for n in names if n not in OURS]
    if foreign:
        raise AdapterError(
            f"{target} holds files besides an adapter ({', '.join(foreign[:5])}), which replacing it would delete: "
            f"choose another folder, or move them"
        )
    return True


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    with _opened(path, os.O_RDONLY) as handle:
        os.fsync(handle)


def exchange(draft: Path, target: Path) -> None:
    """Let two folders swap names in one step; where the system cannot, by two renames, undone if the second fails."""
    if _rename_exchange(draft, target):
        return
    aside = draft.with_name(draft.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _rename_exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)
