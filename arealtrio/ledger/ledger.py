"""Ledger: what a run took, finished, delivered and trained, so that a restart goes on there."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from ..errors import ArealTrioError, LedgerError, UsageError
from ..trajectory import Group
from ..waiting import background
from .entry import Restored
from .file import NO_BATCH, LedgerFile, Operation
from .writer import InlineWriter, ThreadWriter, Writer

logger = logging.getLogger(__name__)

STATE_FORMAT = 1
BEGINNING = (NO_BATCH, 0)  # to start anew is to go back to a checkpoint
FLUSH_SIZE_BYTES = 8 * 2**20
FLUSH_OPERATIONS = 4096
"""What is written early: a commit must not grow with what a long ``flush_s`` lets pile up."""

BYTES_PER_TOKEN = 16  # in memory, of a trajectory
BATCHES_WITHOUT_CHECKPOINT = 256
"""Delivered since anything was trimmed, at which a warning says what keeps the file growing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerStatistics:
    """A ledger's numbers at one moment.

    Args:
        restored: Finished groups that the restart found, and that are not generated again.
        requeued: Prompts that it found unfinished, and that were queued again.
        regenerated: Of these, groups that were finished by weights newer than the restored ones.
        commits: Transactions written.
        pending: Changes that are not durable yet.
        batch: The last batch delivered; -1 is none.
        acknowledged: The last batch acknowledged; -1 is none.
        trimmed: The last batch that is gone from the file; -1 is none.
    """

    restored: int
    requeued: int
    regenerated: int
    commits: int
    pending: int
    batch: int
    acknowledged: int
    trimmed: int


class Ledger:
    """A journal of prompts and what became of them. Make one with ``open_ledger``.

    What is told is told at once, by a synchronous call, and is durable at the next commit, at most
    ``flush_s`` later; ``flush`` waits for it. Changes become durable in the order they were told,
    so what a crash takes is the end of the journal and never a part of its middle.

    A prompt that was taken settles with a group, and is delivered in a batch; or it is ``closed``,
    and is nothing to come back to. Batches are numbered from 0.

    Where the file can not be written, nothing is lost while this process lives: the same changes
    are tried again every ``flush_s``, and ``check`` raises until they are durable.

    Args:
        file: Open, and of nobody else.
        writer: Where it is called.
        flush_s: Seconds between two commits, while there is anything to write.
        checkpoints: How many of the newest ``state_dict`` s can be loaded.

    Attributes:
        on_trouble: Called each time that the file could not be written.
    """

    def __init__(
        self, file: LedgerFile, writer: Writer, *, flush_s: float, checkpoints: int
    ) -> None:
        self.on_trouble: Callable[[], object] = lambda: None
        self._file = file
        self._writer = writer
        self._flush_s = flush_s
        self._checkpoints_kept = checkpoints
        self._pending: list[Operation] = []
        self._pending_bytes = 0
        self._facts: dict[str, Any] = {}
        self._next_key = file.next_key
        self._last_batch = NO_BATCH
        self._versions: dict[int, int] = {}  # that consumed a batch, of those not acknowledged
        self._acknowledged = file.acknowledged
        self._checkpoints = file.checkpoints
        self._serial = file.serial
        self._lost: set[int] = set()  # serials of checkpoints that nobody got
        self._trimmed = file.trimmed
        self._loaded: int | None = None  # the batch that a state_dict named
        self._begun = False
        self._found = {"restored": 0, "requeued": 0, "regenerated": 0}  # by the restart
        self._error: ArealTrioError | None = None
        self._writing = trio.Lock()
        self._waiting = trio.Event()  # something is to be written
        self._urgent = trio.Event()  # and it is much
        self._commits = 0
        self._abandoned = False

    @property
    def run(self) -> str:
        """The name of the run that it is of."""
        return self._file.run

    @property
    def path(self) -> str:
        """Of its file."""
        return self._file.path

    # --- telling -----------------------------------------------------------------------------

    def take(self, epoch: int, position: int, prompts: Sequence[tuple[str, bytes]]) -> range:
        """Prompts were taken from the data loader.

        Args:
            epoch: The pass over it, from 0.
            position: How many were taken of it before these.
            prompts: Each with its ``mark_of``, and encoded.

        Returns:
            A key for each.
        """
        keys = range(self._next_key, self._next_key + len(prompts))
        self._next_key = keys.stop
        for index, (mark, blob) in enumerate(prompts):
            values = (keys[index], epoch, position + index, mark, blob)
            self._tell(("take", values), len(blob))
        self._tell(("progress", (epoch, position + len(prompts))))
        return keys

    def settle(self, key: int, group: Group) -> None:
        """A prompt has become a group to train on."""
        size = BYTES_PER_TOKEN * sum(map(len, group.rows))
        self._tell(("settle", (key, group)), size)

    def close(self, key: int) -> None:
        """A prompt has ended with nothing to train on: rejected, failed, expired."""
        self._tell(("close", (key,)))

    def reopen(self, key: int) -> None:
        """What a prompt had become is of no use any more; the prompt is queued again."""
        self._tell(("reopen", (key,)))

    def deliver(self, keys: Iterable[int], version: int) -> int:
        """These prompts' groups left for the trainer; return the number of their batch."""
        self._last_batch += 1
        number = self._last_batch
        self._versions[number] = version
        for key in keys:
            self._tell(("deliver", (number, key)))
        if number - self._trimmed == BATCHES_WITHOUT_CHECKPOINT:
            logger.warning(
                "ledger %s: %d batches were delivered and none of them can be forgotten, so the "
                "file grows: call state_dict, or ack, with each checkpoint",
                self.path,
                BATCHES_WITHOUT_CHECKPOINT,
            )
        return number

    def take_back(self, number: int) -> None:
        """A batch did not reach the trainer; its groups wait again."""
        newest = self._checkpoints[-1][0] if self._checkpoints else NO_BATCH
        if number == self._last_batch > max(newest, self._acknowledged):
            self._last_batch -= 1  # else it stays a batch, of nothing
        self._tell(("return", (number,)))

    def move(self, keys: Iterable[int], epoch: int) -> None:
        """What these prompts have become is of another epoch now."""
        for key in keys:
            self._tell(("move", (epoch, key)))

    def _tell(self, operation: Operation, size_bytes: int = 0) -> None:
        pending = self._pending
        if not pending:
            self._waiting.set()
        pending.append(operation)
        self._pending_bytes += size_bytes
        self._hurry_if_much()

    def _hurry_if_much(self) -> None:
        if self._pending_bytes > FLUSH_SIZE_BYTES or len(self._pending) > FLUSH_OPERATIONS:
            self._urgent.set()

    # --- acknowledging -----------------------------------------------------------------------

    async def ack(self, number: int) -> None:
        """A checkpoint on the disk was trained on this batch and all before it.

        Raises:
            UsageError: If no such batch was delivered.
            LedgerError: If it can not be written; then it does not count.
        """
        self._check_delivered(number)
        if number > self._acknowledged:
            self._acknowledged = number
            self._facts.update(acknowledged=number)
            if number in self._versions:
                self._facts.update(acknowledged_version=self._versions[number])
            self._trim()
        await self.flush()

    async def state_dict(self, version: int, batch: int | None = None) -> dict[str, Any]:
        """Return what a checkpoint has to hold, once all that it relies on is durable.

        Args:
            version: Of the weights in the checkpoint.
            batch: The last one that they were trained on; None is the last one delivered.

        Raises:
            UsageError: If that is no batch that was delivered, or older than the last checkpoint's.
            LedgerError: If the file can not be written; then there is no checkpoint to make.
        """
        number = self._last_batch if batch is None else batch
        self._check_delivered(number)
        newest, serial = (self._checkpoints or (BEGINNING,))[-1]
        if number < newest:
            raise UsageError(f"state_dict was asked for batch {number}, after one for {newest}")
        is_new = number > newest or not self._checkpoints
        if is_new:
            serial = self._add_checkpoint(number)
        nobody_has_it = is_new or serial in self._lost
        self._lost.discard(serial)
        try:
            await self.flush()
        except BaseException:
            if nobody_has_it:
                self._lost.add(serial)
            raise
        self._lost.discard(serial)  # where another call for it was cancelled meanwhile
        return {
            "format": STATE_FORMAT,
            "run": self.run,
            "batch": number,
            "serial": serial,
            "version": version,
        }

    def _add_checkpoint(self, number: int) -> int:
        """Count a checkpoint among the newest; it pushes out none for one that nobody got."""
        self._serial += 1
        known = [one for one in self._checkpoints if one[1] not in self._lost] or [BEGINNING]
        self._lost.clear()  # none of them is left
        self._checkpoints = (*known, (number, self._serial))[-self._checkpoints_kept :]
        self._facts.update(checkpoints=self._checkpoints, serial=self._serial)
        self._trim()
        return self._serial

    def _check_delivered(self, number: int) -> None:
        if not NO_BATCH <= number <= self._last_batch:
            raise UsageError(
                f"batch {number} was not delivered; the last one is {self._last_batch}"
            )

    def _trim(self) -> None:
        """Forget the batches that no checkpoint which can still be loaded needs.

        What is acknowledged needs none before it, and none after where states came later: a trainer
        that has gone over to them would keep every batch for ever.
        """
        through = self._checkpoints[0][0] if self._checkpoints else self._acknowledged
        if through > self._trimmed:
            self._trimmed = through
            self._versions = {n: v for n, v in self._versions.items() if n >= through}
            self._facts.update(trimmed=through)
            self._tell(("trim", (through,)))
        else:
            self._waiting.set()

    # --- restarting --------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a checkpoint: the batches after the one it names are not trained.

        Raises:
            UsageError: If it is no state of ``state_dict``, or the run has begun.
            LedgerError: If it is of another ledger.
        """
        if self._begun:
            raise UsageError("load_state_dict comes first: this run has begun")
        if not _is_state(state):
            raise UsageError("load_state_dict was given no state that state_dict of a ledger made")
        if state.get("run") != self.run:
            raise LedgerError(
                f"ledger {self.path}: the checkpoint belongs to another ledger than this file. Set "
                "ledger_path to the one it was made with; or go on without: another ledger_path, "
                "no load_state_dict, and recover() from the checkpoint alone"
            )
        if (state["batch"], state.get("serial")) not in self._checkpoints:
            raise LedgerError(
                f"ledger {self.path}: the checkpoint, which ends with batch {state['batch']}, is "
                f"none of the newest {len(self._checkpoints)} that it can go back to. Load one of "
                "these, or choose another ledger_path; ledger_checkpoints says how many are kept, "
                "and to go back to one ends those that came after it"
            )
        self._loaded = state["batch"]

    async def restore(self, version: int) -> Restored:
        """Return what is left to do, by ``load_state_dict`` or else by what was acknowledged.

        Once, before anything is told.

        Args:
            version: Of the weights that the run goes on with.

        Raises:
            UsageError: If it was called already.
            LedgerError: If the checkpoint is older than what was trimmed; if something is
                acknowledged and the weights are older; or if the file can not be read.
        """
        if self._begun:
            raise UsageError(
                f"ledger {self.path}: a run goes on with it already, and it is of one run: close "
                "it, and open it again for another executor"
            )
        batch = self._file.acknowledged if self._loaded is None else self._loaded
        if self._loaded is None:
            self._check_version(version)
            self._check_state_is_needed(version)
        restored = await self._writer.run(self._file.restore, batch, version)
        self._begun = True
        self._last_batch = batch
        self._acknowledged = self._file.acknowledged
        self._checkpoints = self._file.checkpoints
        finished = sum(entry.group is not None for entry in restored.entries)
        self._found = {
            "restored": finished,
            "requeued": len(restored.entries) - finished,
            "regenerated": restored.regenerated,
        }
        return restored

    def _check_version(self, version: int) -> None:
        if self._file.acknowledged_version > version:
            raise LedgerError(
                f"ledger {self.path}: batch {self._file.acknowledged}, of version "
                f"{self._file.acknowledged_version}, is acknowledged, and the weights are of "
                f"version {version}. Call load_state_dict or recover with your checkpoint first; "
                "or begin anew with another ledger_path"
            )

    def _check_state_is_needed(self, version: int) -> None:
        """Refuse to train once more what a checkpoint that is there was trained on."""
        if version > 0 and self._checkpoints and self._acknowledged == NO_BATCH:
            raise LedgerError(
                f"ledger {self.path}: checkpoints were made of this run, and the weights are of "
                f"version {version}: call load_state_dict with the state in your checkpoint before "
                "recover, or what it was trained on would be trained once more. To begin anew, "
                "choose another ledger_path, or go back to version 0"
            )

    # --- writing -----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise while what was told can not be made durable.

        Raises:
            LedgerError: With what to do.
        """
        if self._error is not None:
            raise type(self._error)(*self._error.args) from self._error.__cause__

    async def flush(self) -> None:
        """Return when everything told so far is durable.

        Raises:
            LedgerError: If it can not be written; it is tried again later.
        """
        async with self._writing:
            if self._pending or self._facts:
                await self._write()

    async def _write(self) -> None:
        operations, facts, size = self._pending, self._facts, self._pending_bytes
        self._pending, self._facts, self._pending_bytes = [], {}, 0
        for event in (self._waiting, self._urgent):
            event.set()  # so that nobody is left waiting for one that is gone
        self._waiting, self._urgent = trio.Event(), trio.Event()
        try:
            if not self._abandoned:
                await self._writer.run(self._file.apply, operations, facts)
        except BaseException as exc:
            self._pending = operations + self._pending
            self._facts = {**facts, **self._facts}
            self._pending_bytes += size
            self._waiting.set()
            self._hurry_if_much()
            if isinstance(exc, ArealTrioError):
                self._failed(exc)
            raise
        self._commits += 1
        self._error = None

    def _failed(self, error: ArealTrioError) -> None:
        if self._error is None:
            logger.error("%s", error)
        self._error = error
        self.on_trouble()

    async def _run(self) -> None:
        """Commit what was told, every ``flush_s`` while there is anything."""
        while True:
            waiting = self._waiting
            await waiting.wait()
            if waiting is self._waiting:
                await self._pass_interval()
            if waiting is not self._waiting and self._error is None:
                continue  # somebody's flush wrote it; what came since has an interval of its own
            with suppress(ArealTrioError):  # whoever asks for a batch is told; see check
                await self.flush()

    async def _pass_interval(self) -> None:
        if self._error is not None:  # what is outside is looked at again at an interval
            await trio.sleep(self._flush_s)
        else:
            with trio.move_on_after(self._flush_s):
                await self._urgent.wait()

    def abandon(self) -> None:
        """Write nothing any more: what is left is what a crash at this moment leaves.

        For tests of a restart within one process.
        """
        self._abandoned = True

    async def aclose(self) -> None:
        """Make everything durable and let the file go.

        Raises:
            LedgerError: If it can not be written. What was not is lost now.
        """
        with trio.CancelScope(shield=True):
            try:
                await self.flush()
            finally:
                await self._writer.run(self._file.close)

    @property
    def size_bytes(self) -> int:
        """Of the file; not while a commit is under way."""
        return self._file.size_bytes

    def statistics(self) -> LedgerStatistics:
        """Its numbers at this moment."""
        return LedgerStatistics(
            **self._found,
            commits=self._commits,
            pending=len(self._pending),
            batch=self._last_batch,
            acknowledged=self._acknowledged,
            trimmed=self._trimmed,
        )


def _is_state(state: object) -> bool:
    """Whether it is, by its form, what ``state_dict`` returns."""
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        return False
    return all(type(state.get(name)) is int for name in ("batch", "serial", "version"))


@asynccontextmanager
async def open_ledger(
    path: str,
    identity: Mapping[str, Any],
    *,
    flush_s: float,
    checkpoints: int = 2,
    inline: bool = False,
) -> AsyncIterator[Ledger]:
    """Open a ledger, or make one, for the length of the block; leaving it flushes.

    Args:
        path: Of its file.
        identity: What must not change between restarts, as plain values.
        flush_s: Seconds between two commits.
        checkpoints: How many of the newest ``state_dict`` s can be loaded.
        inline: Write without a thread, while the event loop waits; for virtual time.

    Raises:
        LedgerError: If the file can not be used; on leaving, if the last of it can not be written.
    """
    writer: Writer = InlineWriter() if inline else ThreadWriter()
    file = await writer.run(LedgerFile, path, identity)
    ledger = Ledger(file, writer, flush_s=flush_s, checkpoints=checkpoints)
    try:
        async with background(ledger._run):
            yield ledger
    except BaseException as exc:
        await _close(ledger, quietly=not _is_cancellation(exc))
        raise
    await _close(ledger, quietly=False)


async def _close(ledger: Ledger, *, quietly: bool) -> None:
    """Close it; where that must not hide why the block was left, only log what goes wrong."""
    try:
        await ledger.aclose()
    except ArealTrioError as exc:
        if not quietly:
            raise
        logger.error("what was not written when the run ended is lost: %s", exc)  # noqa: TRY400


def _is_cancellation(error: BaseException) -> bool:
    """Whether a block was only told to end."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)
