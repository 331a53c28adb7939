"""The two compiled forms of ops/thin.c, one for each width of vectors; all else about the package stands in pyproject.toml.

They are optional: without a C compiler the package installs as well, and torch's operations are used in their place
(`deltaw ops` says which). They are no Python modules: ops/cpu_thin.py loads them with ctypes.
"""

import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup

LEVELS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}
FLAGS = ["-O3", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

SOURCE = "src/deltaw/ops/thin.c"

here = sys.platform == "linux" and platform.machine() == "x86_64"
setup(
    ext_modules=[
        Extension(
            f"deltaw.ops.thin_{name}",
            [SOURCE],
            define_macros=[("SOURCE", str(zlib.crc32(Path(SOURCE).read_bytes())))],
            extra_compile_args=[*FLAGS, f"-march={level}"],
            optional=True,
        )
        for name, level in LEVELS.items()
        if here
    ]
)
