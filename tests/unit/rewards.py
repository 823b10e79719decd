"""Reward functions for the processes of a pool: they import this module by name."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_initialized = False


def initialize() -> None:
    global _initialized  # noqa: PLW0603
    _initialized = True


def fail_to_initialize() -> None:
    raise LookupError("no such model")


def was_initialized() -> float:
    return float(_initialized)


def length(prompt: Any, completions: Any, prompt_ids: Any, completion_ids: Any, **_: Any) -> float:
    return float(len(completion_ids))


@dataclass
class Scaled:
    """A callable as a dataclass makes one: equal by value, and without a hash."""

    factor: float

    def __call__(self, value: float) -> float:
        return self.factor * value


def give(value: Any) -> Any:
    return value


def count(path: str, *, then: str = "") -> float:
    """Count its calls in a file; raise if asked to."""
    with Path(path).open("a") as file:
        file.write("x")
    if then:
        raise ValueError(then)
    return 1.0


def pid() -> float:
    return float(os.getpid())


def hang(path: str = "") -> float:
    if path:
        Path(path).write_text(str(os.getpid()))
    while True:
        pass


def backtrack(path: str) -> float:
    """Hang in C, with the interpreter lock held."""
    Path(path).write_text(str(os.getpid()))
    re.match(r"(a+)+$", "a" * 64 + "b")
    return 1.0


def segfault() -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def leave(status: int) -> float:
    os._exit(status)


def leave_politely() -> float:
    raise SystemExit(3)


def fork(status: int) -> float:
    """Let a forked child leave as scripts do, or return; its status is the reward."""
    child = os.fork()
    if child == 0 and status:
        raise SystemExit(status)
    if child == 0:
        return 99.0
    return float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def start_and(end: str, path: str, *, forked: bool) -> float:
    """Start a process that stays, write its id, and hang, crash or return."""
    if not forked:
        child = subprocess.Popen(["sleep", "60"], close_fds=False).pid
    elif (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    Path(path).write_text(str(child))
    if end == "crash":
        os._exit(7)
    return hang() if end == "hang" else 1.0


def grade_in_a_process(value: float) -> float:
    """Grade as those that run code do, each program in a process of its own."""
    answers: Any = multiprocessing.Queue()
    child = multiprocessing.Process(target=answers.put, args=(value,))
    child.start()
    answer = answers.get(timeout=30)
    child.join()
    return float(answer)


def leave_an_alarm(*, then: str = "") -> float:
    """Guard itself as many graders do, and forget to."""
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    if then:
        raise ValueError(then)
    return 1.0


def raise_at_length(size: int) -> float:
    raise ValueError("x" * size + "the end")


def raise_unpicklable() -> float:
    class LocalError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a}{b}")

    raise LocalError(1, 2)


def nap(seconds: float) -> float:
    """Stand for work."""
    time.sleep(seconds)
    return 1.0


def keywords(**data: Any) -> float:
    return float(sum(len(str(key)) for key in sorted(data)))
