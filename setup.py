"""Compile every _core/<stem>.pyx into arealtrio._core.<stem>."""

import os
from pathlib import Path

from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "linetrace": bool(os.environ.get("AREALTRIO_TRACE")),
}

# logprobs.pyx parses floats with std::from_chars (C++17), which libstdc++ implements with a
# correctly rounding, locale-free routine that needs no GIL; answers.pyx writes integers with
# std::to_chars; the others are plain C.
CPLUSPLUS = {"answers", "logprobs"}


def island(source: Path) -> Extension:
    """One extension per file: an edit recompiles that file alone, and nothing cimports."""
    cplusplus = source.stem in CPLUSPLUS
    extension = Extension(
        f"arealtrio._core.{source.stem}",
        [str(source)],
        language="c++" if cplusplus else "c",
        extra_compile_args=["-O3", *(["-std=c++17"] if cplusplus else [])],
    )
    extension.cython_directives = DIRECTIVES  # type: ignore[attr-defined]
    extension.cython_c_in_temp = True  # type: ignore[attr-defined]  # no generated .c beside the sources
    return extension


setup(ext_modules=[island(path) for path in sorted(Path("_core").glob("*.pyx"))])
