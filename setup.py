"""The two compiled forms of the C in ops/, one for each width of vectors; all else about the package stands in pyproject.toml.

They are optional: without a C compiler the package installs as well, and torch's operations are used in their place
(`deltaw ops` says which). They are no Python modules: ops/compiled.py loads them with ctypes.
"""

import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup

LEVELS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}
FLAGS = ["-O3", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

SOURCES = [f"src/deltaw/ops/{name}.c" for name in ("thin", "uniform")]

here = sys.platform == "linux" and platform.machine() == "x86_64"
setup(
    ext_modules=[
        Extension(
            f"deltaw.ops.thin_{name}",
            SOURCES,
            define_macros=[("SOURCE", str(zlib.crc32(b"".join(Path(s).read_bytes() for s in SOURCES))))],
            extra_compile_args=[*FLAGS, f"-march={level}"],
            optional=True,
        )
        for name, level in LEVELS.items()
        if here
    ]
)
