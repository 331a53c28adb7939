"""Admission: the one door through which a file becomes an adapter. Load, merge, serve, store and export all use it.

In order: two named plain files (no link, no pickle), sizes, the manifest if there is one, strict JSON, the tensor header
as a whole, the grammar (every tensor used, every pair complete, ranks as the config says), finite values, and the digest.
Checksums are computed beside all that, and have the first word: nothing is said or given before they are right. Nothing
of a config is imported or run. What only a model can answer (does every change find its parameter, is every target
filled, is it the right base) is `fits`.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, NonFinite
from deltaw.io import manifest, strict_json, tensor_file
from deltaw.io.digest import digest
from deltaw.io.folder import CONFIG, MANIFEST, PICKLED, WEIGHTS, Folder
from deltaw.io.notices import AdapterNotice
from deltaw.io.peft import Parsed, Shapes, grammar_for

MAX_CONFIG = 1 << 20
MAX_RANK = 1 << 16
MUCH = 1 << 18
"""Bytes that are read and hashed in a thread of their own."""
LOOKS = 100
"""How often a folder is looked at again that is replaced while it is read."""


@dataclass(frozen=True)
class Admitted:
    """An adapter that passed every check that needs no model.

    sealed: its bytes were checked against a checksum that deltaw wrote; manifested: it has deltaw's manifest. notes: what
    should be said about it. claimed: the digest that the manifest gives, if files and manifest were compared.
    """

    adapter: Adapter
    parsed: Parsed
    config: Mapping[str, Any]
    sealed: bool
    manifested: bool
    notes: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    claimed: str | None = None

    @property
    def ours(self) -> bool:
        """Whether deltaw wrote it: what it recorded beside the tensors says that they are all there."""
        return self.sealed or self.manifested

    @cached_property
    def digest(self) -> str:
        """The adapter's identity, computed from what was read at the first use.

        Raises:
            AdapterError: the manifest, which describes these very files, claims another.
        """
        found = digest(self.adapter)
        if self.claimed not in (None, found):
            raise AdapterError(f"the manifest claims the digest {self.claimed}, the adapter has {found}: it was forged")
        return found


def admit(source: str | os.PathLike[str] | Folder, *, verify: bool = True, shapes: Shapes = None) -> Admitted:
    """The adapter in a folder, or the reason why not.

    verify: False accepts a folder whose files were edited since deltaw wrote them (all other checks stay).
    shapes: of the base's parameters, where the model is at hand (VeRA and expert weights leave them out of their files).

    Raises:
        AdapterError: the folder is damaged, foreign, incomplete, or says something that cannot be done.
        NonFinite: a tensor holds NaN or infinity.
    """
    with admitting(source, verify=verify, shapes=shapes) as admitted:
        return admitted


@dataclass(frozen=True)
class Arriving:
    """A folder whose weights are being read, and hashed then, beside other work. Call what it holds to wait for them.

    config, manifest: what is in these files; None if there is no manifest. All three are of one writing.
    mapped: the weights are the file's own pages.
    sha: None if there is no checksum to compare with, or none is wanted.
    """

    folder: Folder
    config: bytes
    manifest: bytes | None
    weights: Callable[[], memoryview]
    mapped: bool
    sha: Callable[[], str] | None


def arriving(source: str | os.PathLike[str] | Folder, *, verify: bool = True, mapped: bool = False) -> Arriving:
    """Begin to read a folder. mapped: its weights are not read, but mapped into memory.

    Raises:
        AdapterError: it has not the files of an adapter.
    """
    folder = source if isinstance(source, Folder) else Folder(source)
    for _ in range(LOOKS):
        try:
            return _arriving(folder, verify, mapped)
        except AdapterError:
            if not folder.replaced():
                raise
        folder = Folder(folder.path)
    return _arriving(folder, verify, mapped)


def _arriving(folder: Folder, verify: bool, mapped: bool) -> Arriving:
    with _naming(folder):
        _check_names(folder)
        file = folder.opened(WEIGHTS, aligned=tensor_file.data_start, mapped=mapped)
        manifested = MANIFEST in folder.names
        stamped = verify and manifested
        weights, sha = meanwhile(file.size, file.read, sha256) if stamped else meanwhile(file.size, file.read)
        config = bytes(folder.read(CONFIG, MAX_CONFIG))
        described = bytes(folder.read(MANIFEST, manifest.MAX_BYTES)) if manifested else None
        if folder.replaced():
            raise AdapterError(
                "it is replaced again and again while it is read: try again when its writer has finished"
            )
        return Arriving(folder, config, described, weights, mapped, sha if stamped else None)


@contextmanager
def admitting(
    source: str | os.PathLike[str] | Folder | Arriving, *, verify: bool = True, shapes: Shapes = None
) -> Iterator[Admitted]:
    """`admit` for a block that may run while checksums are still computed: it changes nothing outside of itself.

    Where the block ends, in an error too, the checksums are right, or it ends in an AdapterError that says otherwise.
    """
    files = source if isinstance(source, Arriving) else arriving(source, verify=verify)
    folder, sha = files.folder, files.sha
    with _naming(folder):
        body = None if files.manifest is None else manifest.parse(files.manifest, verify)
        raw_config, raw_weights = files.config, files.weights()

    def check_stamps() -> None:
        if body is not None and sha is not None:
            with _naming(folder):
                manifest.check_file(body, CONFIG, len(raw_config), sha256(raw_config))
                manifest.check_file(body, WEIGHTS, len(raw_weights), sha())

    try:
        with _naming(folder):
            admitted = _understood(raw_config, raw_weights, body, verify, shapes)
        yield admitted
    except Exception:
        check_stamps()  # a damaged file is called that, whatever the damage looks like
        raise
    check_stamps()


@contextmanager
def _naming(folder: Folder) -> Iterator[None]:
    """Errors inside begin with the folder's path."""
    try:
        yield
    except NonFinite as error:
        raise NonFinite(f"{folder.path}: {error}") from error
    except AdapterError as error:
        raise AdapterError(f"{folder.path}: {error}") from error


def _understood(
    raw_config: bytes, raw_weights: memoryview, body: Mapping[str, Any] | None, verify: bool, shapes: Shapes
) -> Admitted:
    """What the files say, whether or not they are those that were written."""
    config = strict_json.parse(raw_config, CONFIG, MAX_CONFIG)
    header = tensor_file.read_header(raw_weights, WEIGHTS)
    if not header.entries:
        raise AdapterError(f"{WEIGHTS} holds no tensor")
    tensors = tensor_file.read_tensors(raw_weights, header)
    # the manifest's checksums are over the very bytes of both files; without it, the weights carry one over both
    sealed = verify and (body is not None or tensor_file.check_seal(raw_config, tensors, header))
    grammar = grammar_for(config)
    check_values(tensors, proven=tensor_file.surely_finite(raw_weights, header), cut=grammar.cuts)
    if shapes is None and body is not None:
        shapes = manifest.shapes(body)
    parsed = grammar.read(config, tensors, shapes)
    adapter = parsed.adapter
    if not adapter.changes:
        raise AdapterError("the adapter changes nothing")
    if body is not None:
        adapter = manifest.refine(adapter, body, verify)
    return Admitted(
        adapter,
        parsed,
        config,
        sealed,
        body is not None,
        parsed.notes,
        {CONFIG: len(raw_config), WEIGHTS: len(raw_weights)},
        body["digest"] if body is not None and verify else None,
    )


def over_any_base(admitted: Admitted) -> Adapter:
    """The adapter, if it says by itself what it changes.

    Raises:
        AdapterError: it was started by a rule that rewrote the base, so that only a model can tell.
    """
    if admitted.parsed.start is not None:
        raise AdapterError(
            f"the adapter was started by {admitted.parsed.start!r}, which PEFT takes out of the base at every load: what it "
            f"changes can only be told with its base. Load it onto the model (dw.load) and save it from there"
        )
    for name in admitted.parsed.base_copies:
        warnings.warn(
            f"{name!r}, a weight of the base that the file carries along, is no part of the change: over a base with other "
            "values there (rows added at random), load the folder itself",
            AdapterNotice,
            stacklevel=3,
        )
    return admitted.adapter


def _check_names(folder: Folder) -> None:
    for name in (CONFIG, WEIGHTS):
        if name in folder.names:
            continue
        pickled = [n for n in PICKLED if n in folder.names]
        if name == WEIGHTS and pickled:
            raise AdapterError(
                f"the weights are a pickle ({pickled[0]}), which can run code and is never read here. In a place you trust, "
                f"convert it: peft.PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
            )
        inner = [n for n in folder.names if (folder.path / n / CONFIG).is_file()]
        hint = f"; there are adapters in {', '.join(str(folder.path / n) for n in inner[:4])}" if inner else ""
        raise AdapterError(f"no {name} in it (found: {', '.join(folder.names[:8]) or 'nothing'}){hint}")


def check_values(tensors: Mapping[str, Tensor], *, proven: bool = False, cut: bool = False) -> None:
    """Refuse empty tensors, ranks beyond the cap, NaN and infinity.

    proven: all values are known to be finite. cut: matrices of rank zero are meant.
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0 and not (cut and tensor.ndim == 2):
            raise AdapterError(
                f"{name!r} is empty {tuple(tensor.shape)}: it was saved from a sharded model without gathering it first"
            )
        if ".lora_" in name and tensor.ndim and min(tensor.shape) > MAX_RANK:
            raise AdapterError(f"{name!r} of shape {tuple(tensor.shape)}: a rank above {MAX_RANK:,} is no adapter's")
        if not proven and tensor.is_floating_point() and not finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFinite(
                f"{name!r} holds {bad} values that are NaN or infinite: the training diverged, or it is damaged"
            )


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: a finite sum proves it, and only where that fails is every value looked at."""
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(total.item()) or bool(torch.isfinite(tensor).all())


def sha256(data: bytes | memoryview) -> str:
    """Hex digits."""
    return hashlib.sha256(data).hexdigest()


def meanwhile(
    size: int, read: Callable[[], memoryview], then: Callable[[memoryview], str] = lambda data: ""
) -> tuple[Callable[[], memoryview], Callable[[], str]]:
    """Begin `read()` and `then(what it gave)` in a thread of its own, if there is much to do; call the results to wait for them.

    For work that runs outside of Python's lock, as reading and hashing do.
    """
    if size < MUCH:
        data = read()
        done = then(data)
        return lambda: data, lambda: done
    pool = ThreadPoolExecutor(1)
    first = pool.submit(read)
    second = pool.submit(lambda: then(first.result()))
    pool.shutdown(wait=False)  # no further work; what was begun goes on
    return first.result, second.result
