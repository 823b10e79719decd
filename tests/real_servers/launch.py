"""Become the given program, but do not outlive the process that started it.

    python launch.py PARENT_PID PROGRAM ARGUMENT…

A test run that is killed runs no teardown, and its servers would hold a port and a core for ever.
So the kernel is asked to send SIGTERM when the parent dies (``prctl(2)``, PR_SET_PDEATHSIG); the
wish survives the ``exec``. It is uttered here, in a fresh interpreter, because ``preexec_fn`` is
unsafe in a parent with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, command: list[str]) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before it could be watched
        raise SystemExit(f"the test run {parent} is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
