"""FileLock: a ledger is of one process, whatever else that process does to the file.

SQLite's own locks are POSIX locks, and a process loses those on a file as soon as it closes any
descriptor of it: to copy the run's directory for a backup is enough (fcntl(2), "Advisory record
locking"). So there is a second lock, by flock(2), on a file beside it. Not on the ledger itself: to
close a descriptor of it is just what drops SQLite's locks, and NFS makes a flock a POSIX lock, so
the two would keep each other out.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from contextlib import suppress

LOCK_SUFFIX = "-lock"
RETRY_S = 0.02
"""Between two looks at a lock that another process has: flock(2) itself waits for ever."""


class FileLock:
    """Held from when it is made until ``release``, or the end of this process.

    The file that it lies on is removed with it; one that a killed process left is no obstacle.

    Args:
        path: Of what is locked.
        wait_s: How long to wait for another process to let go of it.

    Raises:
        BlockingIOError: If it does not.
        OSError: If no lock can be had there.
    """

    def __init__(self, path: str, wait_s: float) -> None:
        self._path = os.path.realpath(path) + LOCK_SUFFIX
        self._handle: int | None = None
        deadline = time.monotonic() + wait_s
        while not self._acquire(last=time.monotonic() >= deadline):
            time.sleep(RETRY_S)
        _HELD.add(self)

    def _acquire(self, *, last: bool) -> bool:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is(handle):
                self._handle = handle
        except BlockingIOError:
            if last:
                raise
        finally:
            if self._handle is None:
                os.close(handle)
        return self._handle is not None

    def _is(self, handle: int) -> bool:
        """Whether it is this file that is at the path: its last owner may have removed it since."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have it. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with suppress(OSError):  # one that stays is no obstacle
            if self._is(handle):  # else the directory was moved, and that one is another run's
                os.unlink(self._path)
        os.close(handle)

    def _forget(self) -> None:
        """Close the descriptor that a fork has copied; the lock stays with the parent."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget()


# A flock belongs to the open file, which a forked child shares: one that outlives its parent, as a
# data loader's worker may, would keep the next run out of the ledger.
os.register_at_fork(after_in_child=_forget_all)
