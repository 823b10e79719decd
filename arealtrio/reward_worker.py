"""What runs in a reward pool's processes. ``reward`` is its other side.

A worker answers with plain tuples of strings and numbers, never with an exception or a value of the
user's: those can fail to be pickled, or to be unpickled where their module is not imported.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import select
import signal
import stat
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from multiprocessing import resource_tracker
from typing import Any, Literal, TypeAlias

from .errors import WorkflowError
from .rows import as_reward

Value: TypeAlias = tuple[Literal["value"], float | None]
Wrong: TypeAlias = tuple[Literal["wrong"], str]  # why the value is no reward
Raised: TypeAlias = tuple[Literal["raised"], str, str]  # the exception's type, its traceback
Report: TypeAlias = Value | Wrong | Raised

TRACEBACK_SIZE = 2**16
"""Characters of a traceback that are told: its head and its end. A batch may hold a thousand."""

_FIRST_FD = 3  # after the standard ones

_broken: Raised | None = None  # how this process's initializer failed


def prepare(job: bytes) -> Raised | None:
    """Make a new process ready, so that no reward pays for it: imports, and the initializer.

    Args:
        job: A pickled (functions, initializer). To unpickle a function is to import its module.

    Returns:
        How it failed, which every reward in this process then answers with as well; None if it did
        not.
    """
    global _broken  # noqa: PLW0603 - one process, one initializer
    end_with_parent()
    try:
        _, initializer = pickle.loads(job)
        if initializer is not None:
            initializer()
    except BaseException as exc:  # noqa: BLE001 - the user's code, told to the other side
        _broken = _raised(exc)
    return _broken


def evaluate(job: bytes) -> Report:
    """Call a reward function.

    Args:
        job: A pickled (function, args, kwargs).
    """
    end_with_parent()
    if _broken is not None:
        return _broken
    ours, status = os.getpid(), 0
    try:
        function, args, kwargs = pickle.loads(job)
        report = _checked(function, args, kwargs)
    except BaseException as exc:  # noqa: BLE001 - sys.exit() in a reward is its error like any other
        report, status = _raised(exc), _status(exc)
    if os.getpid() != ours:  # a child that the function forked: its answer would be the next call's
        os._exit(status)
    return report


def _checked(function: Callable[..., object], args: Any, kwargs: Any) -> Report:
    try:
        value = function(*args, **kwargs)
    finally:  # an alarm that it set and left would ring in somebody else's reward
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        return "value", None if value is None else as_reward(value)
    except WorkflowError as exc:
        return "wrong", str(exc)


def _status(exc: BaseException) -> int:
    """What a process that such an exception ends exits with."""
    code = exc.code if isinstance(exc, SystemExit) else 1
    return code if isinstance(code, int) else int(code is not None)


def _raised(exc: BaseException) -> Raised:
    text = "".join(traceback.format_exception(exc))
    if len(text) > TRACEBACK_SIZE:  # its message may be all that a grader read
        half = TRACEBACK_SIZE // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
    return "raised", type(exc).__qualname__, text


def end_with_parent() -> None:
    """Have the kernel end this process as soon as its parent is gone, whatever it is doing then.

    A pool kills what it started, but a parent that is itself killed can not. An idle worker ends
    when its pipe does; one that hangs would stay for ever. So the sentinel, a pipe that the parent
    holds open as long as it lives, is told to send SIGIO, whose default action on Linux is to end
    the process. A thread that waits for the same pipe would not do: a regular expression that
    backtracks without end keeps the interpreter lock. (Nor would PR_SET_PDEATHSIG: it goes by the
    thread that started this process, and that was a short-lived one.)
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    if flags & os.O_ASYNC:
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([parent.sentinel], [], [], 0)[0]:  # it was gone before
        os._exit(1)
    _keep_pipes()
    multiprocessing.current_process().daemon = False  # which may start none: many graders do


@cache  # where a pipe does not keep the flag above, this comes by with each reward
def _keep_pipes() -> None:
    """Let nothing that a reward starts hold the pipes by whose end the pool knows that of this one.

    What outlives this process (a program in the background, what a killed grader had started) would
    keep the pool waiting for as long as it lives, whatever the time-out. What is executed inherits
    no pipe, and what is forked closes them first of all: those that are written to from here and
    read elsewhere, but for the resource tracker's, which a child goes on to use.
    """
    pipes = {}
    for fd in range(_FIRST_FD, max(map(int, os.listdir("/dev/fd"))) + 1):
        with suppress(OSError):  # it is not open
            status = os.fstat(fd)
            if stat.S_ISFIFO(status.st_mode):
                pipes[fd] = status.st_ino
                os.set_inheritable(fd, False)
    ends = list(pipes.values())
    tracker = resource_tracker.getfd()
    ours = [fd for fd in pipes if ends.count(pipes[fd]) == 1 and _is_written(fd) and fd != tracker]
    os.register_at_fork(after_in_child=lambda: _close(ours))


def _is_written(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        with suppress(OSError):  # the reward has closed it
            os.close(fd)
