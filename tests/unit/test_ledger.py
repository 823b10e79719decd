"""The ledger's file and its commits: what is durable when, and what each trouble says."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from arealtrio.errors import LedgerError, RolloutCrashed, UsageError
from arealtrio.ledger import Ledger, decode_group, encode_group, encode_prompt, open_ledger
from arealtrio.ledger.file import APPLICATION_ID, FORMAT
from arealtrio.ledger.lock import FileLock
from arealtrio.trajectory import Group
from arealtrio.types import Trajectory

from .ledgers import IDENTITY, a_group, copy_of, finish, left, opened, take

Clock = trio.testing.MockClock

# --- when it is durable --------------------------------------------------------------------------


async def test_what_is_told_is_durable_within_flush_s(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "ledger"
    async with opened(path, flush_s=5.0) as ledger:
        await ledger.restore(0)
        await finish(ledger, 2)
        await trio.sleep(4.9)
        with copy_of(path) as copy:
            assert (await left(copy)).entries == ()
        await trio.sleep(0.2)
        assert ledger.statistics().pending == 0
        with copy_of(path) as copy:
            assert [e.group is not None for e in (await left(copy)).entries] == [True, True]
        assert ledger.statistics().commits == 1


async def test_much_is_written_early(autojump_clock: Clock, tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger", flush_s=1000.0) as ledger:
        await ledger.restore(0)
        await finish(ledger, 1, length=600_000)
        await trio.testing.wait_all_tasks_blocked()
        assert ledger.statistics().pending == 0
        take(ledger, 5000, position=1)
        await trio.testing.wait_all_tasks_blocked()
        assert ledger.statistics().pending == 0
        assert trio.current_time() < 1000


async def test_much_is_written_early_after_a_flush_too(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with opened(tmp_path / "ledger", flush_s=1000.0) as ledger:
        await ledger.restore(0)
        take(ledger, 1)
        await trio.testing.wait_all_tasks_blocked()  # the interval has begun
        await ledger.flush()
        await finish(ledger, 1, position=1, length=100)
        await trio.sleep(999)
        assert ledger.statistics().commits == 1  # what came since has an interval of its own
        await finish(ledger, 1, position=2, length=600_000)
        await trio.testing.wait_all_tasks_blocked()
        assert ledger.statistics().pending == 0
        assert ledger.statistics().commits == 2


async def test_what_is_told_right_after_a_flush_is_durable_within_flush_s(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with opened(tmp_path / "ledger", flush_s=5.0) as ledger:
        await ledger.restore(0)
        take(ledger, 1)
        await ledger.flush()
        take(ledger, 1, position=1)  # before the writer has had a turn
        await trio.sleep(5.1)
        assert ledger.statistics().pending == 0


async def test_much_is_written_early_after_a_flush_that_was_cancelled_too(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with opened(tmp_path / "ledger", flush_s=1000.0) as ledger:
        await ledger.restore(0)
        await finish(ledger, 1, length=600_000)
        with trio.CancelScope() as scope:
            scope.cancel()
            await ledger._write()
        await trio.testing.wait_all_tasks_blocked()
        assert ledger.statistics().pending == 0
        assert trio.current_time() < 1000


async def test_an_idle_ledger_sets_no_alarm(autojump_clock: Clock, tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger", flush_s=1.0) as ledger:
        await ledger.restore(0)
        await trio.sleep(100)
        assert ledger.statistics().commits == 0


async def test_leaving_flushes(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger") as ledger:
        await ledger.restore(0)
        await finish(ledger, 3)
    assert len((await left(tmp_path / "ledger")).entries) == 3


async def test_leaving_with_an_error_flushes_too_and_the_error_is_its_own(tmp_path: Path) -> None:
    async def leave() -> None:
        async with opened(tmp_path / "ledger") as ledger:
            await ledger.restore(0)
            await finish(ledger, 3)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await leave()
    assert len((await left(tmp_path / "ledger")).entries) == 3


async def test_a_cancelled_flush_loses_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger", inline=False) as ledger:
        await ledger.restore(0)
        await finish(ledger, 3)
        with trio.CancelScope() as scope:
            scope.cancel()
            await ledger.flush()
        assert scope.cancelled_caught
        assert ledger.statistics().pending == 7
        await ledger.flush()
        assert ledger.statistics().pending == 0
    assert len((await left(tmp_path / "ledger")).entries) == 3


async def test_a_slow_disk_does_not_stop_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "ledger", inline=False, flush_s=0.001) as ledger:
        await ledger.restore(0)
        begun, go_on = threading.Event(), threading.Event()
        apply = ledger._file.apply

        def slow(*args: Any) -> None:
            begun.set()
            go_on.wait(60)
            apply(*args)

        monkeypatch.setattr(ledger._file, "apply", slow)
        await finish(ledger, 1)
        await trio.to_thread.run_sync(begun.wait)
        keys = await finish(ledger, 1, position=1)  # told while the disk is busy
        assert ledger.statistics().pending == 3
        go_on.set()
        await ledger.flush()
        assert ledger.statistics().pending == 0
        assert keys == [1]
    assert len((await left(tmp_path / "ledger")).entries) == 2


# --- restarting ----------------------------------------------------------------------------------


async def test_the_life_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        assert (await ledger.restore(0)).entries == ()
        keys = await finish(ledger, 6)
        take(ledger, 2, position=6)
        assert ledger.deliver(keys[:2], version=0) == 0
        state = await ledger.state_dict(version=1)
        assert ledger.deliver(keys[2:4], version=1) == 1
        ledger.close(keys[4])
    restored = await left(path, 1, state)
    assert [(e.key, e.group is not None) for e in restored.entries] == [
        (2, True), (3, True), (5, True), (6, False), (7, False)]  # fmt: skip
    assert restored.batch == 0
    assert restored.taken == {0: 8}
    assert restored.entries[0].prompt == {"prompt_id": "2"}
    assert restored.marks[0, 6] == "6"


async def test_what_newer_weights_made_is_made_again_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        state = await ledger.state_dict(version=3)
        await finish(ledger, 2, version=3)
        await finish(ledger, 3, position=2, version=4)
    restored = await left(path, 3, state)
    assert [e.group is not None for e in restored.entries] == [True, True, False, False, False]
    assert restored.regenerated == 3
    again = await left(path, 9, state)  # the file has forgotten them as well
    assert [e.group is not None for e in again.entries] == [True, True, False, False, False]
    assert again.regenerated == 0


async def test_a_checkpoint_that_was_never_written_can_be_passed_by(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path, checkpoints=2) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 3)
        states = []
        for n in range(3):
            ledger.deliver([keys[n]], version=0)
            states.append(await ledger.state_dict(version=0))
        assert ledger.statistics().trimmed == 1
    with pytest.raises(LedgerError, match=r"ends with batch 0, is none.*ledger_checkpoints"):
        await left(path, 0, states[0])
    assert (await left(path, 0, states[2])).entries == ()
    assert [e.key for e in (await left(path, 0, states[1])).entries] == [2]
    with pytest.raises(LedgerError, match=r"to go back to one ends those that came after it"):
        await left(path, 0, states[2])  # its batch 2 is no batch any more


def no_room(*_: Any) -> None:
    raise LedgerError("full")


async def fill_disk(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ledger._file, "apply", no_room)
        with pytest.raises(LedgerError, match="full"):
            await ledger.state_dict(version=0)
    await ledger.flush()


async def cancel(ledger: Ledger, _: pytest.MonkeyPatch) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await ledger.state_dict(version=0)
    assert scope.cancelled_caught
    await ledger.flush()


@pytest.mark.parametrize("lose", [fill_disk, cancel])
async def test_states_that_nobody_got_push_out_none_that_somebody_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Any
) -> None:
    path = tmp_path / "ledger"
    async with opened(path, checkpoints=2) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 6)
        ledger.deliver(keys[:1], version=0)
        good = await ledger.state_dict(version=0)
        for key in keys[1:4]:
            ledger.deliver([key], version=0)
            await lose(ledger, monkeypatch)
            assert ledger.statistics().trimmed == 0
        later = await ledger.state_dict(version=0)  # got at last, it is like any other
        ledger.deliver(keys[4:5], version=0)
        await lose(ledger, monkeypatch)
        assert ledger.statistics().trimmed == 3
    assert [e.key for e in (await left(path, 0, later)).entries] == keys[4:]
    with pytest.raises(LedgerError, match="ends with batch 0, is none of the newest"):
        await left(path, 0, good)


async def test_a_state_asked_for_once_more_in_vain_stays_that_of_whoever_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    async with opened(path, checkpoints=2) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 2)
        ledger.deliver(keys[:1], version=0)
        good = await ledger.state_dict(version=0)
        await cancel(ledger, monkeypatch)
        ledger.deliver(keys[1:], version=0)
        await cancel(ledger, monkeypatch)
    assert [e.key for e in (await left(path, 0, good)).entries] == keys[1:]


async def test_two_states_at_once_are_both_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    states: list[Any] = []
    async with opened(path, checkpoints=2) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 3)

        async def save() -> None:
            states.append(await ledger.state_dict(version=0))

        async with trio.open_nursery() as nursery, ledger._writing:
            for key in keys[:2]:  # both wait for the commit under way
                ledger.deliver([key], version=0)
                nursery.start_soon(save)
                await trio.testing.wait_all_tasks_blocked()
    for state in sorted(states, key=lambda state: -state["batch"]):
        assert (await left(path, 0, state)).batch == state["batch"]


async def test_to_start_anew_is_a_checkpoint_until_two_others_are_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 2)
        ledger.deliver(keys[:1], version=0)
        await ledger.state_dict(version=1)
    assert [e.key for e in (await left(path)).entries] == [0, 1]
    async with opened(path) as ledger:
        await ledger.restore(0)
        for key in keys:
            ledger.deliver([key], version=0)
            await ledger.state_dict(version=1)
    with pytest.raises(
        LedgerError, match=r"the checkpoint ends with batch -1, and what batches up\s+to 0 held"
    ):
        await left(path)


async def test_acknowledged_batches_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 4)
        for key in keys[:3]:
            ledger.deliver([key], version=5)
        await ledger.ack(1)
        assert ledger.statistics().trimmed == 1
        await ledger.ack(0)  # older than what is acknowledged: nothing new
        assert ledger.statistics().acknowledged == 1
    assert [e.key for e in (await left(path, 6)).entries] == [2, 3]


async def test_a_trainer_that_goes_over_to_states_trims_by_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path, checkpoints=2) as ledger:
        await ledger.restore(0)
        for position in range(6):
            ledger.deliver(await finish(ledger, 1, position), version=0)
            await (ledger.state_dict(1) if position else ledger.ack(0))
        assert ledger.statistics().trimmed == 4
    with pytest.raises(LedgerError, match=r"ends with batch 0.*Load a newer checkpoint's"):
        await left(path, 1)


async def test_to_go_back_takes_what_was_acknowledged_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path, checkpoints=9) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 6)
        states = []
        for version, key in enumerate(keys):
            ledger.deliver([key], version)
            states.append(await ledger.state_dict(version + 1))
        await ledger.ack(5)
    await left(path, 4, states[3])
    with pytest.raises(LedgerError, match=r"batch 3, of version 4, is acknowledged"):
        await left(path, 3)
    assert [e.key for e in (await left(path, 4)).entries] == keys[4:]


async def test_without_a_checkpoint_the_acknowledged_must_not_be_from_newer_weights(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 1)
        ledger.deliver(keys, version=5)
        await ledger.ack(0)
    with pytest.raises(LedgerError, match=r"batch 0, of version 5, is acknowledged.*recover"):
        await left(path, 4)
    assert (await left(path, 5)).entries == ()


async def test_a_checkpoint_whose_state_was_forgotten_is_not_trained_on_twice(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 2)
        ledger.deliver(keys[:1], version=0)
        await ledger.state_dict(1)
    with pytest.raises(LedgerError, match="call load_state_dict with the state in your checkpoint"):
        await left(path, 1)
    assert len((await left(path, 0)).entries) == 2  # the checkpoint was never written


async def test_a_batch_that_was_taken_back_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        keys = await finish(ledger, 2)
        ledger.take_back(ledger.deliver(keys[:1], version=0))
        assert ledger.deliver(keys[1:], version=0) == 0
        await ledger.ack(0)
    assert [e.key for e in (await left(path)).entries] == [0]


async def test_wrong_calls_change_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger") as ledger:
        good = {"format": 1, "run": ledger.run, "batch": 0, "serial": 1, "version": 0}
        wrong: list[Any] = [{}, None, [], {**good, "format": 2}, {**good, "batch": "x"},
                            {**good, "version": None}]  # fmt: skip
        for state in wrong:
            with pytest.raises(UsageError, match="no state"):
                ledger.load_state_dict(state)
        with pytest.raises(LedgerError, match="belongs to another ledger"):
            ledger.load_state_dict({**good, "run": "x"})
        await ledger.restore(0)
        with pytest.raises(UsageError, match="comes first"):
            ledger.load_state_dict(good)
        with pytest.raises(UsageError, match="batch 0 was not delivered"):
            await ledger.ack(0)
        with pytest.raises(UsageError, match="batch 0 was not delivered"):
            await ledger.state_dict(0, batch=0)
        keys = await finish(ledger, 2)
        for key in keys:
            ledger.deliver([key], version=0)
        await ledger.state_dict(0)
        with pytest.raises(UsageError, match="batch 0, after one for 1"):
            await ledger.state_dict(0, batch=0)


async def test_a_state_is_plain_data(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger") as ledger:
        await ledger.restore(0)
        state = await ledger.state_dict(7)
        assert json.loads(json.dumps(state)) == state
        assert state == {
            "format": 1, "run": ledger.run, "batch": -1, "serial": 1, "version": 7}  # fmt: skip


async def test_a_trainer_that_never_checkpoints_is_told_why_the_file_grows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "ledger") as ledger:
        await ledger.restore(0)
        for _ in range(300):
            ledger.deliver([], version=0)
        (words,) = [r.getMessage() for r in caplog.records]
        assert "256 batches were delivered" in words
        assert "call state_dict, or ack" in words


# --- how large it is -----------------------------------------------------------------------------


async def test_the_file_is_as_large_as_what_is_not_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        sizes = []
        for step in range(60):
            keys = await finish(ledger, 4, position=4 * step, length=4096)
            ledger.deliver(keys, version=step)
            await ledger.state_dict(step)
            sizes.append(ledger.size_bytes)
        batch = 4 * 4096 * 8
        assert max(sizes) < 5 * batch
        assert sizes[-1] <= max(sizes[:10])
        # A window that was large once does not keep its room for ever.
        await finish(ledger, 60, position=240, length=4096)
        await ledger.flush()
        large = ledger.size_bytes
        assert large > 60 * 4096 * 8
        for key in range(240, 300):
            ledger.deliver([key], version=60)
        await ledger.state_dict(61)
        ledger.deliver(await finish(ledger, 1, position=300), version=61)
        await ledger.state_dict(62)
        assert ledger.size_bytes < large / 4
    assert path.stat().st_size < large / 4
    assert not path.with_name("ledger-wal").exists()


# --- trouble -------------------------------------------------------------------------------------


async def test_a_full_disk_is_one_error_and_no_loss(
    autojump_clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger"
    async with opened(path, flush_s=1.0) as ledger:
        await ledger.restore(0)
        woken: list[int] = []
        ledger.on_trouble = lambda: woken.append(1)
        pages = ledger._file._number("page_count")
        ledger._file._db.execute(f"PRAGMA max_page_count = {pages + 4}")
        keys = await finish(ledger, 4, length=20_000)
        with pytest.raises(LedgerError, match=r"no room left.*Make room"):
            await ledger.flush()
        for _ in range(2):
            with pytest.raises(LedgerError, match="no room left"):
                ledger.check()
        with pytest.raises(LedgerError, match="no room left"):
            await ledger.state_dict(0)
        assert woken
        await trio.sleep(10)  # it goes on trying, and says so once
        assert len([r for r in caplog.records if "no room" in r.getMessage()]) == 1
        with copy_of(path) as copy:
            assert (await left(copy)).entries == ()
        ledger._file._db.execute("PRAGMA max_page_count = 1000000")
        await trio.sleep(2)
        ledger.check()
        ledger.deliver(keys[:2], version=0)
        await ledger.state_dict(1)
        assert ledger.statistics().pending == 0
    assert [e.key for e in (await left(path)).entries] == keys


async def test_a_full_disk_is_looked_at_every_flush_s_whoever_else_tries(
    autojump_clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "ledger", flush_s=1.0) as ledger:
        await ledger.restore(0)
        with monkeypatch.context() as patch:
            patch.setattr(ledger._file, "apply", no_room)
            take(ledger, 1)
            await trio.sleep(1.5)
            for _ in range(3):
                with pytest.raises(LedgerError, match="full"):
                    await ledger.flush()
        await trio.sleep(0.6)
        ledger.check()


async def end_full(path: Path, error: Exception | None) -> None:
    """Leave with more to write than there is room for."""
    async with opened(path) as ledger:
        await ledger.restore(0)
        ledger._file._db.execute("PRAGMA max_page_count = 8")
        await finish(ledger, 4, length=20_000)
        if error is not None:
            raise error


async def test_what_is_not_written_at_the_end_is_said(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no room left"):
        await end_full(tmp_path / "ledger", None)


async def test_at_the_end_it_hides_no_other_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError, match="mine"):
        await end_full(tmp_path / "ledger", KeyError("mine"))
    assert any("is lost" in record.getMessage() for record in caplog.records)


FILE_SIZE_LIMIT = """
    import resource, signal, sys
    import trio
    from tests.unit.ledgers import finish, opened
    from arealtrio.errors import LedgerError
    from pathlib import Path

    async def main():
        async with opened(Path(sys.argv[1]), inline=False) as ledger:
            await ledger.restore(0)
            await finish(ledger, 2)
            await ledger.flush()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
            await finish(ledger, 10, position=2, length=20_000)
            try:
                await ledger.flush()
            except LedgerError as exc:
                print(exc)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            await ledger.flush()

    trio.run(main)
"""


async def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    done = await trio.run_process(
        [sys.executable, "-c", textwrap.dedent(FILE_SIZE_LIMIT), str(path)],
        capture_stdout=True,
        cwd=Path(__file__).parents[2],
    )
    assert b"no room left" in done.stdout
    assert len((await left(path)).entries) == 12


HOLDER = """
    import sqlite3, sys
    db = sqlite3.connect(sys.argv[1], isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.communicate(b"")


async def test_a_locked_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arealtrio.ledger.file.LOCK_WAIT_S", 0.05)
    path = tmp_path / "ledger"
    await left(path)
    with (
        held_by_another_process(path),
        pytest.raises(LedgerError, match=r"another process has it open.*another\s+ledger_path"),
    ):
        await left(path)
    assert (await left(path)).entries == ()


async def test_two_runs_can_not_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arealtrio.ledger.file.LOCK_WAIT_S", 0.05)
    async with opened(tmp_path / "ledger") as ledger:
        await ledger.restore(0)
        with pytest.raises(LedgerError, match="another process has it open"):
            await left(tmp_path / "ledger")


HOLDS = """
    import os, sys
    import trio
    from tests.unit.ledgers import finish, opened
    from pathlib import Path

    async def main():
        path = Path(sys.argv[1])
        async with opened(path) as ledger:
            await ledger.restore(0)
            await finish(ledger, 2)
            await ledger.flush()
            path.read_bytes()  # as a backup does; it drops every POSIX lock on the file
            if "fork" in sys.argv and os.fork() == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            else:
                print(os.getpid(), flush=True)
            sys.stdin.read()

    trio.run(main)
"""


@contextmanager
def held_by_another_run(path: Path, *how: str) -> Iterator[int]:
    """Yield the process that has it open; a child that it forks lives as long as the block."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDS), str(path), *how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate(b"")


async def test_a_run_that_reads_its_own_file_keeps_the_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arealtrio.ledger.file.LOCK_WAIT_S", 0.05)
    path = tmp_path / "ledger"
    link = tmp_path / "link"
    link.symlink_to(path)
    with held_by_another_run(path):
        for name in (path, link):
            with pytest.raises(LedgerError, match="another process has it open"):
                await left(name)
        assert (tmp_path / "ledger-wal").exists()
    assert len((await left(path)).entries) == 2


@pytest.mark.parametrize("how", ["", "fork"])
async def test_a_killed_run_keeps_nobody_out(tmp_path: Path, how: str) -> None:
    """Nor does a process that it forked, and that outlives it."""
    path = tmp_path / "ledger"
    with held_by_another_run(path, how) as process:
        os.kill(process, signal.SIGKILL)
        assert len((await left(path)).entries) == 2
    assert os.listdir(tmp_path) == ["ledger"]


def test_a_run_that_ends_leaves_the_lock_of_another_alone(tmp_path: Path) -> None:
    """Its directory was moved, and another run has begun where it was."""
    run = tmp_path / "run"
    run.mkdir()
    first = FileLock(str(run / "ledger"), 0)
    run.rename(tmp_path / "moved")
    run.mkdir()
    second = FileLock(str(run / "ledger"), 0)
    first.release()
    with pytest.raises(BlockingIOError):
        FileLock(str(run / "ledger"), 0)
    second.release()
    assert os.listdir(run) == []


async def test_a_place_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(LedgerError, match=r"knows no locks.*on a disk of this machine"):
        await left(tmp_path / "ledger")


def overwrite(path: Path, at: int, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(os.urandom(count))


async def filled(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.restore(0)
        await finish(ledger, 40, length=4096)


@pytest.mark.parametrize("part", ["header", "schema", "tree", "content"])
async def test_a_damaged_file_is_refused(tmp_path: Path, part: str) -> None:
    path = tmp_path / "ledger"
    await filled(path)
    size = path.stat().st_size
    at, count = {
        "header": (0, 100),
        "schema": (100, 8000),
        "tree": (8192, size - 8192),
        "content": (size - 3 * 8192 + 500, 64),  # inside the pages of a trajectory
    }[part]
    overwrite(path, at, count)
    with pytest.raises(LedgerError, match=r"damaged.*another ledger_path|another program"):
        await left(path)


async def test_a_file_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    await filled(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(LedgerError, match="damaged"):
        await left(path)


async def test_damage_while_it_runs_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    await filled(path)

    async def go_on() -> None:
        async with opened(path) as ledger:
            await ledger.restore(0)
            overwrite(path, 8192, path.stat().st_size - 8192)
            ledger._file._db.execute("PRAGMA cache_size = 0")
            ledger._file._db.execute("PRAGMA shrink_memory")
            await finish(ledger, 40, position=40, length=4096)
            with pytest.raises(LedgerError, match="damaged"):
                await ledger.flush()
            with pytest.raises(LedgerError, match="damaged"):
                ledger.check()

    with pytest.raises(LedgerError, match="damaged"):  # at the end too: not all is written
        await go_on()


async def test_another_programs_files_are_left_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a ledger at all\n" * 100)
    with pytest.raises(LedgerError, match="no ledger at all"):
        await left(text)
    assert text.read_text() == "not a ledger at all\n" * 100
    database = tmp_path / "other.db"
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()
    before = database.read_bytes()
    with pytest.raises(LedgerError, match="database of another program"):
        await left(database)
    assert database.read_bytes() == before


async def test_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    await left(path)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        db.execute(f"PRAGMA user_version = {FORMAT + 1}")
    db.close()
    with pytest.raises(LedgerError, match=f"in format {FORMAT + 1}; this one reads {FORMAT}"):
        await left(path)


async def test_another_runs_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    await left(path)
    other = {**IDENTITY, "consumer_batch_size": 8}
    with pytest.raises(LedgerError, match=r"consumer_batch_size=4; this one has 8"):
        async with open_ledger(str(path), other, flush_s=1, inline=True):
            pass


async def test_a_place_without_a_log_is_refused() -> None:
    with pytest.raises(LedgerError, match="journal_mode is memory"):
        await left(Path(":memory:"))


@pytest.mark.parametrize("where", ["nowhere/ledger", "."])
async def test_a_path_that_can_not_be_written_is_refused(tmp_path: Path, where: str) -> None:
    with pytest.raises(LedgerError, match="can not be opened for writing"):
        await left(tmp_path / where)


async def test_an_extra_of_objects_is_the_workflows_error(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stack.enter_context(pytest.raises(UsageError, match="extra 'notes' holds Python objects"))
        ledger = await stack.enter_async_context(opened(tmp_path / "ledger"))
        await ledger.restore(0)
        (key,) = take(ledger, 1)
        row = a_group().rows[0]
        notes = np.array([{}] * len(row), dtype=object)
        bad = Trajectory(
            input_ids=row.input_ids, loss_mask=row.loss_mask, logprobs=row.logprobs,
            versions=row.versions, reward=0.0, extras={"notes": notes})  # fmt: skip
        ledger.settle(
            key, Group.of([[bad]], number=0, permit_version=0, prompt_id="p", task_id="t")
        )
        with pytest.raises(UsageError, match="extra 'notes'"):
            await ledger.flush()


async def test_a_group_too_large_for_a_record_stops_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("arealtrio.ledger.codec.RECORD_SIZE_MAX", 10_000)
    path = tmp_path / "ledger"
    async with opened(path) as ledger:
        await ledger.restore(0)
        keys = take(ledger, 3)
        for key, length in zip(keys, (8, 5_000, 8), strict=True):
            ledger.settle(key, a_group(length=length))
        ledger.deliver(keys, version=0)
        await ledger.flush()
        ledger.check()
    (words,) = [record.getMessage() for record in caplog.records]
    assert "prompt 'p'" in words
    assert "10000 at most" in words
    assert [e.group is not None for e in (await left(path)).entries] == [True, False, True]


def test_a_prompt_too_large_for_a_record_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arealtrio.ledger.codec.RECORD_SIZE_MAX", 10_000)
    encode_prompt({"image": b"x" * 9_000})
    with pytest.raises(UsageError, match=r"10000 at most; let it name a file"):
        encode_prompt({"image": b"x" * 10_000})


async def test_a_row_that_sqlite_does_not_take_is_no_damage(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stack.enter_context(pytest.raises(LedgerError, match="larger than this build"))
        ledger = await stack.enter_async_context(opened(tmp_path / "ledger"))
        await ledger.restore(0)
        ledger._file._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        await finish(ledger, 1, length=5_000)


@pytest.mark.parametrize("group", [{"prompt_id": "\ud800"}, {"extras": {"\ud800": np.zeros(8)}}])
def test_what_no_text_is_called_by_is_no_damage(group: dict[str, Any]) -> None:
    row = replace(a_group().rows[0], extras=group.get("extras", {}))
    prompt_id = group.get("prompt_id", "p")
    bad = Group.of([[row]], number=0, permit_version=0, prompt_id=prompt_id, task_id="t")
    with pytest.raises(UsageError, match="UnicodeEncodeError in its prompt_id or in the names"):
        encode_group(bad)


def test_numpys_text_is_text() -> None:
    row = replace(a_group().rows[0], extras={np.str_("x"): np.zeros(8)})
    group = Group.of([[row]], number=0, permit_version=0, prompt_id="p", task_id="t")
    assert list(decode_group(encode_group(group)).rows[0].extras) == ["x"]


async def test_a_bug_of_ours_is_no_trouble_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        async with opened(tmp_path / "ledger", flush_s=0.001) as ledger:
            await ledger.restore(0)
            with monkeypatch.context() as patch:
                patch.setattr(ledger._file, "apply", broken)
                take(ledger, 1)
                await trio.sleep_forever()

    with pytest.raises(RolloutCrashed, match="ZeroDivisionError"):
        await run()
