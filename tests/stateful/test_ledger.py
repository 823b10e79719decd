"""The ledger against its model: the same after any sequence, and after a crash anywhere in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from arealtrio.errors import LedgerError
from arealtrio.ledger import Ledger, encode_prompt, mark_of

from ..models.ledger import ModelLedger
from ..unit.ledgers import a_group, opened

INDEX = st.integers(0, 5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 1), st.integers(1, 3)),
        st.tuples(st.just("produce"), st.integers(1, 3)),
        st.tuples(st.just("produce"), st.integers(1, 3)),
        st.tuples(st.just("settle"), INDEX),
        st.tuples(st.just("settle"), INDEX),
        st.tuples(st.just("settle"), INDEX),
        st.tuples(st.just("close"), INDEX),
        st.tuples(st.just("reopen"), INDEX),
        st.tuples(st.just("move"), INDEX, st.integers(0, 1)),
        st.tuples(st.just("deliver"), st.integers(1, 3)),
        st.tuples(st.just("deliver"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["take_back", "update", "flush", "checkpoint", "wait"])),
        st.tuples(st.just("lose_checkpoint")),
        st.tuples(st.just("ack"), INDEX),
        # which checkpoint to go back to, counted from the newest; the fourth is none at all
        st.tuples(st.just("crash"), st.integers(0, 3)),
    ),
    min_size=12,
    max_size=60,
)


def prompt_of(key: int) -> dict[str, Any]:
    return {"prompt_id": f"p{key}", "input_ids": [key, key + 1]}


@contextmanager
def scratch() -> Iterator[Path]:
    memory = "/dev/shm"  # where there is no disk to wait for
    with tempfile.TemporaryDirectory(dir=memory if Path(memory).is_dir() else None) as directory:
        yield Path(directory)


class Comparison:
    """A ledger in files of its own, its model, and a trainer's checkpoints."""

    def __init__(self, directory: Path, kept: int) -> None:
        self.directory = directory
        self.kept = kept
        self.model = ModelLedger(kept)
        self.stack = AsyncExitStack()
        self.ledger: Ledger = None  # type: ignore[assignment]
        self.lives = 0
        self.content = 0
        self.version = 0
        self.saved: list[tuple[dict[str, Any], int]] = []  # states, with their versions
        self.got: tuple[int, int] | None = None  # the newest checkpoint that the trainer has
        self.given_back = True  # whether the last batch can not be taken back

    @property
    def path(self) -> Path:
        return self.directory / f"life-{self.lives}"

    async def open(self) -> None:
        self.ledger = await self.stack.enter_async_context(
            opened(self.path, flush_s=5, checkpoints=self.kept)
        )

    async def die(self) -> None:
        """End as SIGKILL would: the next life gets what is on the disk at this moment."""
        before = self.path
        self.lives += 1
        for suffix in ("", "-wal"):
            shutil.copy(f"{before}{suffix}", f"{self.path}{suffix}")
        self.ledger.abandon()
        await self.stack.aclose()

    async def start(self) -> None:
        await self.open()
        await self.ledger.restore(0)
        self.model.restore(None, 0)

    async def crash(self, back: int) -> None:
        self.model.crash()
        state, self.version = self.saved[-1 - back] if back < len(self.saved) else (None, 0)
        await self.die()
        await self.open()
        self.given_back = True
        await self.restore(state)

    async def restore(self, state: dict[str, Any] | None) -> None:
        checkpoint = None if state is None else (state["batch"], state["serial"])
        try:
            if state is not None:
                self.ledger.load_state_dict(state)
            restored = await self.ledger.restore(self.version)
        except LedgerError:
            assert not self.model.may_restore(checkpoint, self.version)
            await self.anew()
            return
        assert self.model.may_restore(checkpoint, self.version)
        self.got = checkpoint
        again = self.model.restore(checkpoint, self.version)
        assert restored.regenerated == again
        assert restored.batch == self.model.now.batch
        assert dict(restored.taken) == self.model.now.taken
        assert restored.marks == {
            (p.epoch, p.position): f"p{p.key}"
            for p in self.model.now.prompts.values()
            if p.position >= 0
        }
        expected = [p for p in self.model.now.prompts.values() if p.batch is None]
        assert [e.key for e in restored.entries] == [p.key for p in expected]
        for entry, prompt in zip(restored.entries, expected, strict=True):
            assert entry.epoch == prompt.epoch
            assert entry.prompt == prompt_of(prompt.key)
            number = None if entry.group is None else entry.group.number
            assert number == prompt.group

    async def anew(self) -> None:
        """What was asked for can not be had: another file, as the error says."""
        await self.stack.aclose()
        self.model = ModelLedger(self.kept)
        self.saved, self.version, self.got = [], 0, None
        self.lives += 1
        await self.start()

    # --- the steps -------------------------------------------------------------------------------

    def take(self, epoch: int, count: int) -> None:
        position = self.model.now.taken.get(epoch, 0)
        keys = self.model.take(epoch, count)
        prompts = [prompt_of(key) for key in keys]
        told = [(mark_of(p, blob), blob) for p in prompts for blob in [encode_prompt(p)]]
        assert list(self.ledger.take(epoch, position, told)) == keys

    def produce(self, count: int) -> None:
        self.take(0, count)
        for _ in range(count):
            self.settle(-1)

    def settle(self, index: int) -> None:
        if running := self.model.running():
            key = running[index % len(running)].key
            self.content += 1
            self.model.settle(key, self.content, self.version)
            self.ledger.settle(key, a_group(self.content, version=self.version))

    def close(self, index: int) -> None:
        if running := self.model.running():
            key = running[index % len(running)].key
            self.model.close(key)
            self.ledger.close(key)

    def reopen(self, index: int) -> None:
        if finished := self.model.finished():
            key = finished[index % len(finished)].key
            self.model.reopen(key)
            self.ledger.reopen(key)

    def move(self, index: int, epoch: int) -> None:
        if finished := self.model.finished():
            key = finished[index % len(finished)].key
            self.model.move(key, epoch)
            self.ledger.move([key], epoch)

    def deliver(self, count: int) -> None:
        keys = [prompt.key for prompt in self.model.finished()[:count]]
        if keys:
            number = self.model.deliver(keys, self.version)
            assert self.ledger.deliver(keys, self.version) == number
            self.given_back = False

    def take_back(self) -> None:
        if not self.given_back:
            self.ledger.take_back(self.model.now.batch)
            self.model.take_back()
            self.given_back = True

    def update(self) -> None:
        self.version += 1

    async def flush(self) -> None:
        await self.ledger.flush()
        self.model.flush()

    async def wait(self) -> None:
        """Let ``flush_s`` pass: then everything is durable without being asked to be."""
        await trio.sleep(6)
        assert self.ledger.statistics().pending == 0
        self.model.flush()

    async def checkpoint(self) -> None:
        state = await self.ledger.state_dict(self.version)
        self.got = (state["batch"], state["serial"])
        assert self.got == self.model.checkpoint()
        self.saved.append((state, self.version))
        self.given_back = True

    async def lose_checkpoint(self) -> None:
        """A ``state_dict`` that is cancelled; what it was to wait for is durable a little later."""
        with trio.CancelScope() as scope:
            scope.cancel()
            await self.ledger.state_dict(self.version)
        self.model.checkpoint(lost=True)
        self.given_back = True
        await self.ledger.flush()

    async def ack(self, index: int) -> None:
        batch = self.model.now.batch
        if batch >= 0:
            number = max(0, batch - index)
            self.model.ack(number)
            await self.ledger.ack(number)
            self.given_back = True

    def check(self) -> None:
        statistics = self.ledger.statistics()
        assert statistics.batch == self.model.now.batch
        assert statistics.acknowledged == self.model.now.acknowledged
        assert statistics.trimmed == self.model.now.trimmed
        if self.got is not None and self.kept > 1:  # one alone is pushed out by the one under way
            assert self.got in self.ledger._checkpoints
            assert self.got[0] >= statistics.trimmed
        self.ledger.check()


async def compare(steps: list[tuple[Any, ...]], kept: int, directory: Path) -> None:
    both = Comparison(directory, kept)
    await both.start()
    for name, *arguments in [*steps, ("crash", 0)]:
        pending = getattr(both, name)(*arguments)
        if pending is not None:
            await pending
        both.check()
    await both.stack.aclose()


@settings(max_examples=300)
@given(STEPS, st.integers(1, 3))
def test_a_crash_anywhere_leaves_what_the_model_says(
    steps: list[tuple[Any, ...]], kept: int
) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    with scratch() as directory:
        trio.run(compare, steps, kept, directory, clock=clock)
