"""Recording: what an executor tells its ledger of its batches, and gets back after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from .batching import BatchStream, DataLoader
from .config import RolloutConfig
from .errors import UsageError
from .groups import Deliver, GroupTask
from .ledger import Entry, Ledger, Restored, open_ledger
from .recorded_feed import LoaderPlace, RecordedFeed
from .settlement import RolloutResult
from .trajectory import Batch
from .types import Outcome

_UNDER_WAY = "under_way"

DELIVERED_KEPT = 8
"""Batches that may still be given back: one for each thread that waits, and few have several."""


class Recording:
    """Keeps the ledger of what ``prepare_batch`` takes from its data loaders.

    All of it is called on the trio side, but for what ``placing`` returns. A prompt is known here
    by its task id from when it is taken until its batch is delivered.

    Args:
        ledger: Open.

    Attributes:
        restored: Finished groups that ``begin`` found.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._keys: dict[str, int] = {}  # task id -> the ledger's key
        # batch -> the epoch under way as it left, and the keys that its groups had
        self._delivered: dict[int, tuple[int, dict[str, int]]] = {}
        self._feed: RecordedFeed | None = None
        self._loader: DataLoader | None = None  # the last one
        self._epoch = 0  # the next to begin
        self._loaded: Mapping[str, Any] | None = None
        self._restored: Restored | None = None
        self._begun_with = 0  # the version
        self.restored = 0
        self._entries: dict[int, list[Entry]] = {}  # by epoch, of those not begun
        self._begin_lock = trio.Lock()

    def check(self) -> None:
        """Raise LedgerError while what happened can not be made durable."""
        self.ledger.check()

    # --- restarting --------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the checkpoint that holds this state.

        Raises:
            UsageError: If the run has begun, or it is no such state.
            LedgerError: If it is not of this ledger, or too old.
        """
        if not (LoaderPlace.is_in(state) and _is_count(_epoch_under_way(state))):
            raise UsageError(
                "load_state_dict was given something without the data loader's place: give it "
                "what state_dict of the executor or the controller returned"
            )
        self.ledger.load_state_dict(state)
        self._loaded = state

    @property
    def begun(self) -> bool:
        """Whether it is decided where the run goes on."""
        return self._restored is not None

    def check_version(self, version: int) -> None:
        """Refuse to go on with weights older than the loaded checkpoint's, or than it was begun by.

        Raises:
            UsageError: If they are.
        """
        if version < self._begun_with:
            raise UsageError(
                f"where the ledger's run goes on was decided by version {self._begun_with} already "
                f"(prepare_batch and state_dict do), and groups are back that {version} can not "
                "have made: restart, and call recover first"
            )
        wanted = 0 if self._loaded is None else self._loaded["version"]
        if version < wanted:
            raise UsageError(
                f"load_state_dict was given the state of version {wanted}, and the servers have "
                f"{version}: call recover({wanted}, update) before anything else"
            )

    async def begin(self, version: int) -> int:
        """Decide where the run goes on; later calls change nothing.

        Args:
            version: Of the weights that it goes on with.

        Returns:
            To the first caller, how many finished groups are there, to be counted as accepted; to
            others 0.

        Raises:
            UsageError: If they are older than the checkpoint's.
            LedgerError: If the ledger can not go back to the checkpoint, or can not be read.
        """
        async with self._begin_lock:
            if self._restored is not None:
                return 0
            self.check_version(version)
            self.restored = self._sort(await self.ledger.restore(version), version)
            self._begun_with = version
            return self.restored

    def _sort(self, restored: Restored, version: int) -> int:
        """Number what is finished by its oldest token, below every permit that will be granted."""
        finished = [entry for entry in restored.entries if entry.group is not None]
        finished.sort(key=lambda entry: _age_order(entry, version))
        for number, entry in enumerate(finished, -len(finished)):
            assert entry.group is not None
            renumbered = replace(entry, group=replace(entry.group, number=number))
            self._entries.setdefault(entry.epoch, []).append(renumbered)
        for entry in restored.entries:
            if entry.group is None:
                self._entries.setdefault(entry.epoch, []).append(entry)
        newest = max(restored.taken, default=0)
        self._epoch = min([newest if self._loaded is None else _epoch_under_way(self._loaded),
                           *self._entries])  # fmt: skip
        self._restored = replace(restored, entries=())  # each is held until its epoch begins
        return len(finished)

    # --- what a stream does ------------------------------------------------------------------

    def open_feed(self, loader: DataLoader) -> RecordedFeed:
        """The feed of the next epoch."""
        assert self._restored is not None, "begin comes first"
        epoch, restored, loaded = self._epoch, self._restored, self._loaded
        last = max([epoch, *restored.taken, *([loaded["epoch"]] if loaded else [])])
        feed = RecordedFeed(
            loader,
            epoch,
            restored.taken.get(epoch, 0),
            {at: mark for (of, at), mark in restored.marks.items() if of == epoch},
            ended=epoch < last,
            place=None if loaded is None or epoch < last else LoaderPlace.of(loaded),
        )
        if epoch >= last:  # the loader has gone on from where the checkpoint left it
            self._loaded = None
        self._epoch += 1
        self._loader = loader
        self._feed = feed
        return feed

    def entries(self) -> list[Entry]:
        """Remove what is left to do of the epoch whose feed is open, and return it."""
        assert self._feed is not None
        return self._entries.pop(self._feed.epoch, [])

    def end_epoch(self) -> None:
        """The feed is at its end, and everything was delivered."""
        self._feed = None

    def adopt(self, task: GroupTask, entry: Entry) -> None:
        """A prompt that was taken before the restart is this task now."""
        self._keys[task.task_id] = entry.key

    def taken(self, tasks: Iterable[GroupTask]) -> None:
        """Prompts that the open feed gave last are these tasks now."""
        feed = self._feed
        assert feed is not None
        position, prompts = feed.take_fresh()
        keys = self.ledger.take(feed.epoch, position, prompts)
        for task, key in zip(tasks, keys, strict=True):
            self._keys[task.task_id] = key

    def deliver_to(self, stream: BatchStream) -> Deliver:
        """The ``deliver`` of a stream's groups: it tells the ledger, then the stream."""

        def deliver(task: GroupTask, result: RolloutResult) -> None:
            self._settled(result)
            stream.deliver(task, result)

        return deliver

    def _settled(self, result: RolloutResult) -> None:
        if result.group is not None:
            self.ledger.settle(self._keys[result.task_id], result.group)
        elif result.outcome is not Outcome.CANCELLED:  # which is for the next life to run
            self.close(result.task_id)

    def close(self, task_id: str) -> None:
        """A task ended with nothing to train on."""
        self.ledger.close(self._keys.pop(task_id))

    def reopen(self, task_id: str) -> None:
        """What a task had become is too old; it is queued again."""
        self.ledger.reopen(self._keys[task_id])

    def delivered(self, batch: Batch) -> Batch:
        """A batch leaves for the trainer; return it with its number."""
        keys = {group.task_id: self._keys.pop(group.task_id) for group in batch.groups}
        number = self.ledger.deliver(keys.values(), batch.version)
        self._delivered[number] = self._under_way, keys
        self._delivered.pop(number - DELIVERED_KEPT, None)
        return replace(batch, number=number)

    def returned(self, batch: Batch) -> None:
        """A batch did not reach the trainer; its groups are of the epoch that is under way now.

        Raises:
            UsageError: If it is none of the last ``DELIVERED_KEPT``, or was returned already.
        """
        if batch.number is None:
            return
        if batch.number not in self._delivered:
            raise UsageError(
                f"batch {batch.number} can not be given back: it was already, or it is none of the "
                f"last {DELIVERED_KEPT}, which are all that are remembered"
            )
        epoch, keys = self._delivered.pop(batch.number)
        self._keys.update(keys)
        self.ledger.take_back(batch.number)
        if epoch != self._under_way:  # else a restart would deliver it as an epoch of its own
            self.ledger.move(keys.values(), self._under_way)

    @property
    def _under_way(self) -> int:
        """The epoch whose feed is open, else the next."""
        return self._epoch if self._feed is None else self._feed.epoch

    # --- checkpoints -------------------------------------------------------------------------

    def placing(self) -> Callable[[], dict[str, Any]]:
        """Fix where the data loader is, and in which epoch, for a checkpoint.

        Asked before the ledger's own state: what was taken by now is then durable when that
        returns.

        Returns:
            To be called in the thread that iterates the loader, before it does so again: it asks
            the loader for its state, and returns it with the rest.
        """
        epoch, loader_place = self._under_way, self._loader_placing()
        return lambda: {**loader_place().as_dict(), _UNDER_WAY: epoch}

    def _loader_placing(self) -> Callable[[], LoaderPlace]:
        if self._loaded is not None:  # nothing of the newest epoch was taken since
            return partial(LoaderPlace.of, self._loaded)
        if self._feed is not None:
            return self._feed.placing()
        return partial(LoaderPlace.between_epochs, self._epoch, self._loader)

    async def state_dict(self, version: int, batch: Batch | None) -> dict[str, Any]:
        """The ledger's part of a checkpoint. See ``Ledger.state_dict``."""
        return await self.ledger.state_dict(version, None if batch is None else number_of(batch))

    async def ack(self, batch: Batch) -> None:
        """See ``Ledger.ack``."""
        await self.ledger.ack(number_of(batch))


def number_of(batch: Batch) -> int:
    """The number of a batch that a ledger knows.

    Raises:
        UsageError: If it was made without one.
    """
    if batch.number is None:
        raise UsageError("this batch is in no ledger: only those of prepare_batch are")
    return batch.number


def _epoch_under_way(state: Mapping[str, Any]) -> Any:
    """The epoch that a checkpoint was made in, or before.

    Its loader's place may be of an earlier one: an epoch that was begun before a restart leaves the
    loader alone. Older states do not say.
    """
    return state.get(_UNDER_WAY, state["epoch"])


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _age_order(entry: Entry, version: int) -> tuple[int, int, int]:
    group = entry.group
    assert group is not None
    head = version if group.head_version is None else group.head_version
    return entry.epoch, head, entry.key


@asynccontextmanager
async def open_recording(
    config: RolloutConfig, ledger: Ledger | None = None
) -> AsyncIterator[Recording | None]:
    """Record to a ledger for the length of the block: a given one, or what the config names.

    Yields:
        None where there is neither.
    """
    if ledger is not None:
        yield Recording(ledger)
    elif config.ledger_path is None:
        yield None
    else:
        async with open_ledger_of(config) as ledger:
            yield Recording(ledger)


@asynccontextmanager
async def open_ledger_of(config: RolloutConfig, *, inline: bool = False) -> AsyncIterator[Ledger]:
    """Open the ledger that a config names. See ``open_ledger``."""
    assert config.ledger_path is not None
    # What decides which prompts a version's budget covers, and whose tokens these are. Servers,
    # limits and policies may change from one life to the next.
    identity = {"consumer_batch_size": config.consumer_batch_size, "model": config.model}
    async with open_ledger(
        config.ledger_path,
        identity,
        flush_s=config.ledger_flush_s,
        checkpoints=config.ledger_checkpoints,
        inline=inline,
    ) as ledger:
        yield ledger
