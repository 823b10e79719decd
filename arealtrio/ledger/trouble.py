"""What SQLite reports, in words: whose doing it is, and what to do."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LedgerError

_NEW_PATH = "or go on without it: another ledger_path, and recover() from your checkpoint alone"

_BUSY = (
    "another process has it open: a ledger is of one run at a time. End that process, or choose "
    "another ledger_path"
)
_FULL = (
    "there is no room left for it. Nothing is delivered meanwhile, and nothing is lost: what is "
    "not written is tried again. Make room and call again"
)
_DAMAGED = (
    f"it is damaged, or no ledger at all. Put a copy of it back; {_NEW_PATH}. What was finished "
    "and not trained is then generated again"
)
_DENIED = "it can not be opened for writing. Look at its permissions and those of its directory"
_DISK = "the disk failed. Nothing is delivered that is not written; look at the system's log"

_TOO_LARGE = (
    "a record is larger than this build of SQLite takes. Use one with the usual limit of 10^9 "
    "bytes, or smaller prompts and groups"
)
_NO_LOCK = (
    "its file system knows no locks, so nothing would keep a second run out of it. Choose a "
    "ledger_path on a disk of this machine"
)

_WORDS = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CANTOPEN: _DENIED,
    sqlite3.SQLITE_READONLY: _DENIED,
    sqlite3.SQLITE_PERM: _DENIED,
    sqlite3.SQLITE_IOERR: _DISK,
    sqlite3.SQLITE_TOOBIG: _TOO_LARGE,
}
# Of the "disk failed" kind, but with a cause of its own: a limit of the process or the file system.
_FULL_CODES = frozenset((sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE))

_WORDS_OF_ERRNO = {
    errno.EWOULDBLOCK: _BUSY,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EIO: _DISK,
    errno.ENOLCK: _NO_LOCK,
    errno.ENOSYS: _NO_LOCK,
    errno.EOPNOTSUPP: _NO_LOCK,
}


def ledger_error(path: str, exc: Exception) -> LedgerError:
    """What to raise for an error of SQLite's, of the lock's, or of a record's checksum."""
    if isinstance(exc, ValueError):
        return LedgerError(f"ledger {path}: {exc}; {_DAMAGED}")
    if isinstance(exc, OSError):
        words = _WORDS_OF_ERRNO.get(exc.errno or 0, _DENIED)
        return LedgerError(f"ledger {path}: {words} ({exc.strerror})")
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    words = _FULL if code in _FULL_CODES else _WORDS.get(code & 0xFF, _DAMAGED)
    return LedgerError(f"ledger {path}: {words} (SQLite: {exc})")


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Raise LedgerError, with the cause attached, for what goes wrong in the block."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):  # a bug of ours
        raise
    except (sqlite3.Error, OSError, ValueError) as exc:
        raise ledger_error(path, exc) from exc
