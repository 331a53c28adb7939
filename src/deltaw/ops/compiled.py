"""The compiled library of ops/: thin.c and uniform.c, for one width of vectors, found, checked and loaded once."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.ops.matmul import PLAIN

LEVELS = {"AVX512": "avx512", "AVX2": "avx2"}
SOURCES = ("thin.c", "uniform.c")


class Library(NamedTuple):
    """The functions of thin.c and uniform.c, and the addresses of OpenMP's `parallel`, thread number and team size."""

    sweep: Any
    uniform: Any
    team: tuple[int, int, int]


@functools.cache
def library() -> Library | str:
    """The compiled library, or why there is none."""
    if os.environ.get("DELTAW_COMPILED") == "0":
        return "DELTAW_COMPILED is 0"
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability())
    if level is None:
        return "this processor has neither AVX2 nor AVX-512"
    found = importlib.util.find_spec(f"deltaw.ops.thin_{level}")
    if found is None or found.origin is None:
        return "deltaw was installed without a C compiler, or not on Linux (x86-64)"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = [torch_cpu.GOMP_parallel, torch_cpu.omp_get_thread_num, torch_cpu.omp_get_num_threads]
        compiled = ctypes.CDLL(found.origin)
        sweep, uniform, source = compiled.sweep, compiled.uniform, ctypes.c_int64.in_dll(compiled, "source").value
    except (OSError, AttributeError, ValueError) as error:
        return f"it cannot be loaded: {error}"
    written = [Path(__file__).with_name(name) for name in SOURCES]
    if all(path.exists() for path in written) and zlib.crc32(b"".join(p.read_bytes() for p in written)) != source:
        return "it was compiled from another version of its sources: install deltaw again (pip install -e .)"
    sweep.restype = ctypes.c_int
    uniform.restype, uniform.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_float] * 2]
    parallel, thread, size = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in team)
    return Library(sweep, uniform, (parallel, thread, size))


def level() -> str:
    """What sweeps run on here, in a word; bits depend on it."""
    return "torch" if isinstance(library(), str) else LEVELS[torch.backends.cpu.get_cpu_capability()]


def addressable(t: Tensor) -> bool:
    """Whether these are numbers of 32 bit that lie in memory as they are, one at least (empty or freed memory has no address)."""
    return t.dtype == torch.float32 and type(t) in PLAIN and t.is_cpu and t.data_ptr() != 0 and not t.is_neg()
