"""safetensors files, read with suspicion and written to the byte the same for the same tensors.

The format: 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, then the data
without gaps. The header is checked whole before a tensor is made. Our files carry, in the header's metadata, a checksum
over the adapter's config and every tensor: a flipped bit is found even where the manifest was lost.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from deltaw.core.adapter import ALIGNMENT
from deltaw.errors import AdapterError
from deltaw.io import strict_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 8 << 20
MAX_TENSORS = 100_000
MAX_NAME = 1024
FOREIGN = {
    b"version https://git-lfs": "a pointer of git LFS: fetch the file itself (git lfs pull)",
    b"PK\x03\x04": "a zip or a pickle of PyTorch under this name, which is never read",
    b"\x80\x02": "a pickle, which can run code and is never read",
    b"\x80\x04": "a pickle, which can run code and is never read",
    b"<": "a page of HTML or XML: the download went wrong",
    b"GGUF": "a GGUF file",
}
"""How files begin that are often found in the place of one, and what to say of them."""
CHECKSUM = "deltaw_checksum"


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: where in the data section its bytes lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, checked. `data` is where the data section starts."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int


def data_start(first: bytes) -> int:
    """Where the tensors of a file begin, which its first 8 bytes tell."""
    return 8 + int.from_bytes(first, "little")


def read_header(buffer: memoryview, what: str) -> Header:
    """The checked header of the file in `buffer`.

    Raises:
        AdapterError: anything in which the header and the file disagree, or that is beyond the caps.
    """
    if len(buffer) < 8:
        raise AdapterError(f"{what} is cut off: {len(buffer)} bytes, not even a header length")
    for start, kind in FOREIGN.items():  # a header of 640 bytes begins as a pickle does: the brace behind it decides
        if bytes(buffer[8:9]) != b"{" and bytes(buffer[: len(start)]) == start:
            raise AdapterError(f"{what} is no safetensors file, but {kind}")
    length = int.from_bytes(buffer[:8], "little")
    if length > MAX_HEADER:
        raise AdapterError(f"{what}: a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    if 8 + length > len(buffer):
        raise AdapterError(f"{what} is cut off: its header should have {length:,} bytes, {len(buffer) - 8:,} are there")
    raw = bytes(buffer[8 : 8 + length])
    if not raw.startswith(b"{"):
        raise AdapterError(f"{what} is not a safetensors file: its header does not start with '{{'")
    if raw.count(b'":') > 5 * MAX_TENSORS:  # four for every tensor, before any of them is looked at
        raise AdapterError(f"{what} holds more than {MAX_TENSORS:,} tensors, or as many facts: refused")
    parsed = strict_json.parse(raw, f"the header of {what}", MAX_HEADER)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"{what}: __metadata__ must map texts to texts")
    if len(parsed) > MAX_TENSORS:
        raise AdapterError(f"{what} holds {len(parsed):,} tensors; at most {MAX_TENSORS:,} are read")
    entries = {name: _entry(name, value, what) for name, value in parsed.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise AdapterError(
                f"{what}: the data of {name!r} starts at {entry.start}, expected at {end} (overlap or gap)"
            )
        end = entry.end
    if 8 + length + end != len(buffer):
        raise AdapterError(
            f"{what}: the header describes {end:,} bytes of data, the file holds {len(buffer) - 8 - length:,}"
        )
    return Header(entries, metadata, 8 + length)


def _entry(name: str, value: Any, what: str) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise AdapterError(f"{what}: {name[:80]!r} is no tensor name")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{what}: the header entry of {name!r} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise AdapterError(f"{what}: {name!r} has dtype {value['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise AdapterError(f"{what}: shape or data_offsets of {name!r} are no lists of whole numbers")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise AdapterError(f"{what}: {name!r} of shape {shape} and {value['dtype']} does not fill bytes {offsets}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def read_tensors(buffer: memoryview, header: Header) -> dict[str, Tensor]:
    """The tensors, in the header's order of names. They lie in `buffer` side by side: nothing is copied.

    A tensor whose bytes are not aligned for its dtype (other tools write such files) gets memory of its own.
    """
    found = {}
    for name, e in header.entries.items():
        if e.start == e.end:
            found[name] = torch.empty(e.shape, dtype=e.dtype)
            continue
        count, at, held = (e.end - e.start) // e.dtype.itemsize, header.data + e.start, buffer
        if at % e.dtype.itemsize:
            at, held = 0, memoryview(bytearray(buffer[at : header.data + e.end]))
        found[name] = torch.frombuffer(held, dtype=e.dtype, count=count, offset=at).reshape(e.shape)
    return found


def surely_finite(buffer: memoryview, header: Header) -> bool:
    """Whether one sum over a file of 32-bit tensors proves that no value is NaN or infinite; False says nothing."""
    count = (len(buffer) - header.data) // 4
    if header.data % 4 or not count or any(e.dtype != torch.float32 for e in header.entries.values()):
        return False
    with np.errstate(all="ignore"):  # not torch: its threads would go on spinning where the checksum is computed
        return math.isfinite(np.frombuffer(buffer, np.float32, count, header.data).sum())


def checksum(config: bytes, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over the config's bytes, the other metadata, and every tensor's name, dtype, shape and content."""
    digest = hashlib.sha256(hashlib.sha256(config).digest())
    digest.update(strict_json.canonical({k: v for k, v in metadata.items() if k != CHECKSUM}))
    for name, tensor in sorted(tensors.items()):
        digest.update(strict_json.canonical([name, NAMES[tensor.dtype], list(tensor.shape)]))
        for piece in content(tensor):
            digest.update(piece)
    return digest.hexdigest()


def check_seal(config: bytes, tensors: Mapping[str, Tensor], header: Header) -> bool:
    """Whether the file carries a checksum of ours, which then is right.

    Raises:
        AdapterError: it is wrong, or damaged itself.
    """
    meta = header.metadata
    seal = meta.get(CHECKSUM)
    if seal is None and not any(len(value) == 64 for value in meta.values()):
        return False
    plain = {k: v for k, v in meta.items() if len(v) != 64}
    expected = checksum(config, tensors, plain)
    if seal != expected:
        if seal is None and expected not in meta.values():
            return False
        raise AdapterError(
            "the config and the weights are not what was written together (the checksum in the weights differs): damaged, "
            "mixed up, or edited; fetch them again, or read with verify=False (--no-verify) if you mean it"
        )
    return True


def content(tensor: Tensor, piece: int = 1 << 24) -> Iterator[memoryview]:
    """The bytes of a tensor in C order, in pieces; little endian, as the format wants."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), piece):
        yield flat[start : start + piece].numpy().data


class Sink(Protocol):
    """What bytes are written to: a file, or what stands before one."""

    def write(self, data: bytes | memoryview, /) -> object:
        """As a file's."""


def write(file: Sink, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: widest dtypes first, of them first what fills whole lines of `ALIGNMENT` bytes, then by name.

    So every tensor lies at a multiple of its dtype's size, and those at the front where torch would place them, so that a
    mapped file can be computed with as it is.
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, tensors[n].nbytes % ALIGNMENT != 0, n))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        t = tensors[name]
        size = t.numel() * t.dtype.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        for part in content(tensors[name]):
            file.write(part)
