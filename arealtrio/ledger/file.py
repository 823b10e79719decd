"""LedgerFile: the ledger on the disk, in one SQLite file. Synchronous, and of one thread at a time.

A prompt is in ``prompts`` from when it is taken until the batch that it is in is trimmed, or until
it settles with nothing to train. Its trajectories are in ``groups``, apart: SQLite rewrites a whole
row for any change of it, and these are large and never change.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, TypeAlias

from ..errors import LedgerError
from ..trajectory import Group
from . import codec
from .codec import decode_group, decode_prompt, encode_group
from .entry import Entry, Restored
from .lock import FileLock
from .trouble import explained

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x4154524C  # "ATRL"
FORMAT = 1
NO_BATCH = -1
PAGE_SIZE_BYTES = 16384  # the cheapest for trajectories of thousands of tokens
LOG_SIZE_BYTES = 64 * 2**20
LOCK_WAIT_S = 2.0
"""For another process to let go of the file: one that was just killed may not be gone yet."""

Operation: TypeAlias = tuple[
    Literal["take", "progress", "settle", "close", "reopen", "deliver", "return", "move", "trim"],
    tuple[Any, ...],
]
"""A change: what to do, and the values for it."""

Checkpoint: TypeAlias = tuple[int, int]
"""What a ``state_dict`` names: the last batch, and its own serial number."""

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE epochs (epoch INTEGER PRIMARY KEY, taken INTEGER NOT NULL);
CREATE TABLE prompts (
    key INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, position INTEGER NOT NULL, mark TEXT NOT NULL,
    batch INTEGER, prompt BLOB NOT NULL);
CREATE INDEX prompts_of_batches ON prompts (batch) WHERE batch IS NOT NULL;
CREATE TABLE groups (key INTEGER PRIMARY KEY, tail INTEGER, content BLOB NOT NULL);
"""

_STATEMENTS: Mapping[str, tuple[str, ...]] = {
    "take": ("INSERT OR REPLACE INTO prompts (key, epoch, position, mark, prompt) "
             "VALUES (?, ?, ?, ?, ?)",),
    "progress": ("INSERT OR REPLACE INTO epochs (epoch, taken) VALUES (?, ?)",),
    "settle": ("INSERT OR REPLACE INTO groups (key, tail, content) VALUES (?, ?, ?)",),
    "close": ("DELETE FROM groups WHERE key = ?", "DELETE FROM prompts WHERE key = ?"),
    "reopen": ("DELETE FROM groups WHERE key = ?",),
    "deliver": ("UPDATE prompts SET batch = ? WHERE key = ?",),
    "return": ("UPDATE prompts SET batch = NULL WHERE batch = ?",),
    # It has no place in that epoch's loader: nothing is to be compared with it.
    "move": ("UPDATE prompts SET epoch = ?, position = -1 WHERE key = ?",),
    "trim": ("DELETE FROM groups WHERE key IN (SELECT key FROM prompts WHERE batch <= ?)",
             "DELETE FROM prompts WHERE batch <= ?"),
}  # fmt: skip


class LedgerFile:
    """An open ledger. Nobody else can open it meanwhile.

    Every change is one transaction, durable when ``apply`` returns, after a loss of power as well.

    Args:
        path: Of the file; it is made if it is not there.
        identity: What must be the same for a run to go on; a file with another one is refused.

    Attributes:
        run: Its name, made with the file; a checkpoint says which ledger it belongs to.
        acknowledged: The last batch that the trainer acknowledged; -1 is none.
        acknowledged_version: The version that consumed it.
        trimmed: The last batch that is gone from the file.
        checkpoints: The newest ``state_dict`` s, oldest first: the batch and the serial of each.
        serial: Of the newest ``state_dict``; 0 before the first.
        next_key: Above every key.

    Raises:
        LedgerError: If it can not be opened, is another process's, damaged, of another version of
            this library, or of another run.
    """

    def __init__(self, path: str, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.run = uuid.uuid4().hex
        self.acknowledged = self.acknowledged_version = self.trimmed = NO_BATCH
        self.checkpoints: tuple[Checkpoint, ...] = ()
        self.serial = 0
        with explained(path), ExitStack() as stack:
            self._lock = FileLock(path, LOCK_WAIT_S)
            stack.callback(self._lock.release)  # last: until then it is not to be opened
            self._db = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None,
                                       check_same_thread=False)  # fmt: skip
            stack.callback(self._db.close)
            self._open(identity)
            (last,) = self._db.execute("SELECT max(key) FROM prompts").fetchone()
            self.next_key = 0 if last is None else last + 1
            self._close = stack.pop_all().close

    # --- opening ---------------------------------------------------------------------------------

    def _open(self, identity: Mapping[str, Any]) -> None:
        # Exclusive: no other program, and no shared memory, which network file systems lack.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        if self._number("schema_version") == 0:
            self._db.execute(f"PRAGMA page_size = {PAGE_SIZE_BYTES}")
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        else:
            self._check_format()
        (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise LedgerError(
                f"ledger {self.path}: SQLite can keep no log beside it there (journal_mode is "
                f"{mode}). Choose a ledger_path on a disk of this machine"
            )
        self._db.execute("PRAGMA synchronous = FULL")
        # Some builds overwrite what is deleted with zeros: a third of the price, for no secret.
        self._db.execute("PRAGMA secure_delete = OFF")
        # What is trimmed while it is in the log is never copied out of it.
        self._db.execute(f"PRAGMA wal_autocheckpoint = {LOG_SIZE_BYTES // PAGE_SIZE_BYTES}")
        self._db.execute(f"PRAGMA journal_size_limit = {LOG_SIZE_BYTES}")
        with self._transaction():  # which takes the lock, for good
            if self._number("schema_version") == 0:
                self._make(identity)
            else:
                self._check(identity)

    def _number(self, pragma: str) -> int:
        return int(self._db.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _make(self, identity: Mapping[str, Any]) -> None:
        for statement in filter(str.strip, _SCHEMA.split(";")):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {FORMAT}")
        self._set_facts(run=self.run, identity=dict(identity))

    def _check_format(self) -> None:
        if self._number("application_id") != APPLICATION_ID:
            raise LedgerError(
                f"ledger {self.path}: this is a database of another program. Choose another "
                "ledger_path; the file was left as it is"
            )
        if self._number("user_version") != FORMAT:
            raise LedgerError(
                f"ledger {self.path}: it was written by another version of this library, in format "
                f"{self._number('user_version')}; this one reads {FORMAT}. End the run with the "
                "version that began it, or choose another ledger_path"
            )

    def _check(self, identity: Mapping[str, Any]) -> None:
        (answer,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if answer != "ok":
            raise ValueError(answer)
        facts = {
            name: json.loads(value)
            for name, value in self._db.execute("SELECT name, value FROM facts")
        }
        self._check_identity(facts["identity"], dict(identity))
        self.run = facts["run"]
        self.acknowledged = facts.get("acknowledged", NO_BATCH)
        self.acknowledged_version = facts.get("acknowledged_version", NO_BATCH)
        self.trimmed = facts.get("trimmed", NO_BATCH)
        self.checkpoints = tuple((batch, serial) for batch, serial in facts.get("checkpoints", ()))
        self.serial = facts.get("serial", 0)

    def _check_identity(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        differs = sorted(n for n in {*theirs, *ours} if theirs.get(n) != ours.get(n))
        if differs:
            name = differs[0]
            raise LedgerError(
                f"ledger {self.path}: it is of another run, with {name}={theirs.get(name)!r}; this "
                f"one has {ours.get(name)!r}. Go on with the config it was begun with, or choose "
                "another ledger_path"
            )

    # --- writing ---------------------------------------------------------------------------------

    def apply(self, operations: Sequence[Operation], facts: Mapping[str, Any]) -> None:
        """Write changes, in order, and facts: all of them or none.

        Each may be written twice: after an error nobody knows whether the first time counted.

        Raises:
            LedgerError: If the disk is full, or fails.
            UsageError: If a group can not be written.
        """
        with explained(self.path):
            with self._transaction():
                for kind, run in groupby(operations, itemgetter(0)):
                    self._apply(kind, [values for _, values in run])
                self._set_facts(**facts)
            if "trimmed" in facts:
                self._shrink()

    def _apply(self, kind: str, values: Sequence[tuple[Any, ...]]) -> None:
        rows: Iterable[tuple[Any, ...]] = values
        if kind == "settle":
            rows = self._encoded(values)
        for statement in _STATEMENTS[kind]:
            self._db.executemany(statement, rows)

    def _encoded(self, groups: Iterable[tuple[int, Group]]) -> Iterator[tuple[Any, ...]]:
        """The rows of groups, one at a time; one that is too large stays out.

        Its prompt is then an unfinished one. An error would come again with every try, and keep all
        that settles later from the disk as well.
        """
        for key, group in groups:
            blob = encode_group(group)
            if len(blob) > codec.RECORD_SIZE_MAX:
                logger.error(
                    "ledger %s: the group of prompt %.80r is of %d bytes, and a record holds %d at "
                    "most. It is delivered, but not kept: after a crash it is generated again. Let "
                    "groups have fewer members, or smaller extras (such as routed experts)",
                    self.path,
                    group.prompt_id,
                    len(blob),
                    codec.RECORD_SIZE_MAX,
                )
            else:
                yield key, group.tail_version, blob

    def _set_facts(self, **facts: Any) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)",
            [(name, json.dumps(value)) for name, value in facts.items()],
        )

    def _shrink(self) -> None:
        """Give pages back to the file system where most are free; else they are soon used again."""
        if 2 * self._number("freelist_count") > self._number("page_count"):
            # It takes a step for each page, and only a script is stepped to its end.
            self._db.executescript("PRAGMA incremental_vacuum")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    # --- reading ---------------------------------------------------------------------------------

    def restore(self, batch: int, version: int) -> Restored:
        """Count as trained what is in ``batch`` and before, and return what is left to do.

        Batches after it are no batches any more. Groups with a token newer than ``version`` are
        forgotten, and their prompts are to be run again.

        Args:
            batch: The last one in the checkpoint; -1 is none.
            version: Of the checkpoint's weights.

        Raises:
            LedgerError: If a later batch was trimmed already; or the file is damaged.
        """
        self._check_kept(batch)
        with explained(self.path), self._transaction():
            self._db.execute("UPDATE prompts SET batch = NULL WHERE batch > ?", (batch,))
            if batch < self.acknowledged:
                self.acknowledged = batch
                newest = NO_BATCH if batch == NO_BATCH else version
                self.acknowledged_version = min(self.acknowledged_version, newest)
            self.checkpoints = tuple(one for one in self.checkpoints if one[0] <= batch)
            self._set_facts(
                acknowledged=self.acknowledged,
                acknowledged_version=self.acknowledged_version,
                checkpoints=self.checkpoints,
            )
            newer = self._db.execute(
                "DELETE FROM groups WHERE tail > ? AND key IN "
                "(SELECT key FROM prompts WHERE batch IS NULL)",
                (version,),
            )
            return Restored(
                batch=batch,
                entries=tuple(self._entries()),
                taken=dict(self._db.execute("SELECT epoch, taken FROM epochs")),
                marks={
                    (epoch, position): mark
                    for epoch, position, mark in self._db.execute(
                        "SELECT epoch, position, mark FROM prompts WHERE position >= 0"
                    )
                },
                regenerated=newer.rowcount,
            )

    def _check_kept(self, batch: int) -> None:
        if batch < self.trimmed:
            raise LedgerError(
                f"ledger {self.path}: the checkpoint ends with batch {batch}, and what batches up "
                f"to {self.trimmed} held is trimmed. Load a newer checkpoint's state_dict, or "
                "choose another ledger_path; ledger_checkpoints says how many can be gone back to"
            )

    def _entries(self) -> Iterator[Entry]:
        rows = self._db.execute(
            "SELECT key, epoch, prompt, content FROM prompts LEFT JOIN groups USING (key) "
            "WHERE batch IS NULL ORDER BY key"
        )
        for key, epoch, prompt, content in rows:
            group: Group | None = None if content is None else decode_group(content)
            yield Entry(key, epoch, decode_prompt(prompt), group)

    @property
    def size_bytes(self) -> int:
        """Of the file, without what the last commits left beside it."""
        return self._number("page_count") * self._number("page_size")

    def close(self) -> None:
        """Let the file go. Idempotent."""
        with explained(self.path):
            self._close()
