"""Baselines compiled for the occasion, and ratios that a busy machine does not spoil."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Distribution, Extension  # type: ignore[import-untyped]
from setuptools.command.build_ext import build_ext  # type: ignore[import-untyped]


@cache
def compile_empty() -> Any:
    """Compile ``empty.pyx`` as the islands are compiled, outside the tree, and return its class.

    The library ships no such class: it would be there for its benchmarks alone.
    """
    source = Path(__file__).with_name("empty.pyx")
    folder = tempfile.mkdtemp(prefix="arealtrio-benchmarks-")
    extension = Extension("empty", [str(source)], extra_compile_args=["-O3"])
    modules = cythonize([extension], build_dir=folder, quiet=True)  # type: ignore[no-untyped-call]
    build = build_ext(Distribution({"ext_modules": modules}))
    build.build_lib = build.build_temp = folder
    build.ensure_finalized()
    build.run()
    spec = spec_from_file_location("empty", build.get_ext_fullpath("empty"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Empty


def median_ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Run both in turn, and return the median of ours over the median of theirs."""
    mine, yours = medians(ours, theirs, rounds)
    return mine / yours


def medians(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Run both in turn, and return the median seconds of each.

    In turn, because a shared machine changes its speed between one minute and the next.
    """
    taken: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for run, times in taken.items():
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[ours]), statistics.median(taken[theirs])
