"""Look at an installed arealtrio: whole, compiled, typed, and not the checkout's."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import arealtrio

ISLANDS = {"answers", "collate", "counters", "heap", "logprobs", "records", "vectors"}
# Modules for those who have more than the wheel asks for; nothing else may need it.
GUESTS = {
    "arealtrio.simulate.figure": "matplotlib",
    "arealtrio.testing.pytest_plugin": "pytest",
}


def main() -> None:
    """Import every module, and compare the files with what a wheel should hold."""
    home = Path(arealtrio.__file__).parent
    if not home.is_relative_to(sys.prefix):
        raise SystemExit(f"{home} is not what was installed into {sys.prefix}")
    modules = {m.name for m in pkgutil.walk_packages([str(home)], "arealtrio.")}
    for name in sorted(modules):
        import_module(name)
    core = {name.rpartition(".")[2] for name in modules if name.startswith("arealtrio._core.")}
    if core != ISLANDS:
        raise SystemExit(f"the compiled islands are {sorted(core)}, not {sorted(ISLANDS)}")
    missing = [f for f in wanted_files(home) if not f.is_file()]
    if missing:
        raise SystemExit(f"the wheel lacks {', '.join(map(str, missing))}")
    strays = [str(p) for p in home.rglob("*") if p.suffix in (".pyx", ".c", ".cpp")]
    if strays:
        raise SystemExit(f"the wheel ships sources: {', '.join(strays)}")
    sys.stdout.write(f"{len(modules)} modules of {home} import\n")


def import_module(name: str) -> None:
    """Import a module, or find that what it lacks is its guest."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != GUESTS.get(name):
            raise


def wanted_files(home: Path) -> list[Path]:
    """List what a type checker and the interpreter need beside the modules."""
    core = home / "_core"
    stubs = [core / f"{island}.pyi" for island in sorted(ISLANDS)]
    compiled = [core / f"{island}{EXTENSION_SUFFIXES[0]}" for island in sorted(ISLANDS)]
    return [home / "py.typed", *stubs, *compiled]


if __name__ == "__main__":
    main()
