"""The embedded servers among this process's children, and a pipe that nobody reads."""

from __future__ import annotations

import os
from typing import BinaryIO

import psutil


def embedded_servers() -> list[psutil.Process]:
    """Not every child: ``multiprocessing`` keeps helpers of its own once a test has used it."""
    return [child for child in psutil.Process().children(recursive=True) if _is_server(child)]


def _is_server(process: psutil.Process) -> bool:
    try:
        return "arealtrio.embedded" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def closed_pipe() -> BinaryIO:
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "wb")
