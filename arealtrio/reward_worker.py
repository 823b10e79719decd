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
import traceback
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from .errors import WorkflowError
from .rows import as_reward

Value: TypeAlias = tuple[Literal["value"], float | None]
Wrong: TypeAlias = tuple[Literal["wrong"], str]  # why the value is no reward
Raised: TypeAlias = tuple[Literal["raised"], str, str]  # the exception's type, its traceback
Report: TypeAlias = Value | Wrong | Raised

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
    value = function(*args, **kwargs)
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
