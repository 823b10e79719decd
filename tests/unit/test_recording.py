"""An executor with a ledger, killed and started again: what it trains on, makes again and reads."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio import (
    Batch,
    Outcome,
    RolloutConfig,
    RolloutController,
    WeightUpdate,
    WorkflowExecutor,
    open_executor,
)
from arealtrio.errors import LedgerError, UsageError
from arealtrio.recording import open_ledger_of
from arealtrio.testing import FixedLengths, SimulatedFleet, checkpoint, open_fleet

from .embedded_server import save_weights
from .puppet import Generates, Instant, Puppet, check_counts, prompt_list, settled
from .server_process import two_processes

Clock = trio.testing.MockClock


class StatefulLoader:
    """A data loader in an order of its own, with a state that means what torchdata's does."""

    def __init__(self, count: int, batch: int = 1) -> None:
        self._prompts = [{"prompt_id": f"s{n * 7 % count}"} for n in range(count)]
        self._batch = batch
        self._at = 0
        self._finished = False
        self._resumes = False
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        if not self._resumes:
            self._at = 0
        self._resumes = self._finished = False
        while self._at < len(self._prompts):
            start, self._at = self._at, self._at + self._batch
            self.reads += 1
            yield self._prompts[start : self._at]
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at, "finished": self._finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._at = state["at"]
        self._resumes = not state["finished"]


class Run:
    """A trainer's lives on one fleet: what they trained on, and what workflows ran."""

    def __init__(self, path: Path, fleet: SimulatedFleet, **config: Any) -> None:
        self.path = path
        self.fleet = fleet
        self.config = {
            "consumer_batch_size": 4, "max_staleness": 1, "ledger_flush_s": 1.0, **config,
        }  # fmt: skip

    @asynccontextmanager
    async def life(self, state: Any = None, **more: Any) -> AsyncIterator[WorkflowExecutor]:
        """One life of the executor; it ends by a crash unless its block says otherwise."""
        config = RolloutConfig(
            servers=self.fleet.addresses, ledger_path=str(self.path), **{**self.config, **more}
        )
        async with (
            open_ledger_of(config, inline=True) as ledger,
            open_executor(config, transport=self.fleet, ledger=ledger) as executor,
        ):
            if state is not None:
                executor.load_state_dict(state)
                version = state["version"]
                update = WeightUpdate.from_disk(checkpoint(version), version) if version else None
                await executor.recover(version, update)
            yield executor
            ledger.abandon()


@asynccontextmanager
async def open_run(tmp_path: Path, **config: Any) -> AsyncIterator[Run]:
    async with open_fleet(2, lengths=FixedLengths(10)) as fleet:
        yield Run(tmp_path / "ledger", fleet, **config)


def ids(batch: Batch) -> list[str]:
    return sorted(group.prompt_id for group in batch.groups)


async def advance(executor: WorkflowExecutor) -> None:
    version = executor.get_version() + 1
    await executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))


class Counted(Generates):
    """Generates, and counts the runs of each prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    async def arun_episode(self, engine: Any, data: Any, /) -> Any:
        self.runs[str(data["prompt_id"])] += 1
        return await super().arun_episode(engine, data)


async def train(
    executor: WorkflowExecutor, loader: Any, workflow: Any, steps: int | None = None
) -> list[str]:
    """Train for some steps or to the epoch's end; return the prompts."""
    trained: list[str] = []
    while steps is None or steps > 0:
        try:
            batch = await executor.prepare_batch(loader, workflow)
        except StopAsyncIteration:
            break
        trained += ids(batch)
        await advance(executor)
        steps = None if steps is None else steps - 1
    return trained


# --- a crash -------------------------------------------------------------------------------------


async def test_after_a_crash_every_prompt_is_trained_once_and_what_was_finished_is_not_made_again(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    loader, workflow = prompt_list(32), Counted()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            trained = await train(executor, loader, workflow, 3)
            state = await executor.state_dict()
            assert state["batch"] == 2
            assert state["version"] == 3
            lost = await executor.prepare_batch(loader, workflow)  # is in no checkpoint
            await trio.sleep(30)  # what runs ends, and is durable
        before = workflow.runs.copy()
        async with run.life(json.loads(json.dumps(state))) as executor:
            statistics = executor.ledger_statistics()
            assert statistics.restored == 8  # the lost batch, and one that waited
            assert statistics.regenerated == 0
            check_counts_of_ledger(executor, version=3, restored=8)
            batch = await executor.prepare_batch(loader, workflow)
            assert batch.number == 3
            assert ids(batch) == ids(lost)
            trained += ids(batch)
            await advance(executor)
            trained += await train(executor, loader, workflow)
            again = {p: n for p, n in workflow.runs.items() if before[p] and n > before[p]}
            assert not again
    assert sorted(map(int, trained)) == list(range(32))


def check_counts_of_ledger(executor: WorkflowExecutor, version: int, restored: int) -> None:
    stat = executor.staleness_manager.get_stats()
    batch = executor.config.consumer_batch_size
    assert stat.accepted == version * batch + restored
    assert executor.counts.of(Outcome.ACCEPTED) == restored
    assert stat.running == executor.counts.running
    assert stat.enqueued == executor.counts.queued


async def test_what_newer_weights_made_is_made_again(autojump_clock: Clock, tmp_path: Path) -> None:
    loader, workflow = prompt_list(24), Counted()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            trained = await train(executor, loader, workflow, 1)
            state = await executor.state_dict()
            await train(executor, loader, workflow, 3)  # up to version 4, and lost
            await trio.sleep(30)
        before = workflow.runs.copy()
        async with run.life(state) as executor:
            assert executor.ledger is not None
            statistics = executor.ledger.statistics()
            assert statistics.regenerated >= 12  # those that started in version 2, 3 or 4
            assert executor.get_version() == 1
            async for batch in executor.batches(loader, workflow):
                assert batch.staleness().min() >= 0
                assert batch.staleness().max() <= 1
                trained += ids(batch)
                await advance(executor)
        again = [p for p in before if workflow.runs[p] > before[p]]
        assert len(again) == statistics.regenerated
    assert sorted(map(int, trained)) == list(range(24))


async def test_what_was_not_finished_or_not_durable_is_run_again_from_its_prompt(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    puppet = Puppet()
    async with open_run(tmp_path, max_concurrent_rollouts=16) as run:
        async with run.life() as executor, trio.open_nursery() as nursery:
            nursery.start_soon(executor.prepare_batch, prompt_list(8), puppet)
            await settled()
            for prompt in (0, 3):
                puppet.end(prompt)
            await trio.sleep(1.5)
            puppet.end(5)  # which is not durable yet
            await settled()
            assert executor.ledger is not None
            executor.ledger.abandon()
            nursery.cancel_scope.cancel()
        puppet.started.clear()
        async with run.life() as executor, trio.open_nursery() as nursery:
            nursery.start_soon(executor.prepare_batch, prompt_list(8), puppet)
            await settled()
            assert sorted(puppet.started) == [1, 2, 4, 5, 6, 7]
            puppet.end_all()


async def test_a_restart_that_loads_nothing_begins_anew_with_what_is_there(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    loader, workflow = prompt_list(16), Counted()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            first = await executor.prepare_batch(loader, workflow)
            await trio.sleep(10)
        before = workflow.runs.copy()
        async with run.life() as executor:
            assert ids(await executor.prepare_batch(loader, workflow)) == ids(first)
            check_counts(executor)
            assert workflow.runs == before
            check_counts_of_ledger(executor, version=0, restored=8)


async def test_twice_killed_and_its_numbers_stay_in_the_order_of_age(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    loader, workflow = prompt_list(40), Counted()
    trained: list[str] = []
    state = None
    async with open_run(tmp_path, max_staleness=2) as run:
        for _ in range(4):
            async with run.life(state) as executor:
                trained += await train(executor, loader, workflow, 1)
                state = await executor.state_dict()
                await trio.sleep(20)
        async with run.life(state) as executor:
            async for batch in executor.batches(loader, workflow):
                assert batch.staleness().max() <= 2
                trained += ids(batch)
                await advance(executor)
    assert sorted(map(int, trained)) == list(range(40))
    assert max(workflow.runs.values()) == 1


# --- how a group ends ----------------------------------------------------------------------------


async def test_what_was_rejected_or_failed_is_not_run_again(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    def decide(prompt: Any) -> Any:
        if prompt["prompt_id"] % 3 == 0:
            return None
        if prompt["prompt_id"] % 3 == 1:
            raise ValueError("told to")
        return "accept"

    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            await executor.prepare_batch(prompt_list(60), Instant(decide))
            await trio.sleep(5)
        puppet = Puppet()
        async with run.life() as executor:
            batch = await executor.prepare_batch(prompt_list(60), puppet)
            assert [int(i) % 3 for i in ids(batch)] == [2] * 4
            assert {int(p) % 3 for p in puppet.started} <= {0, 1, 2}
            ledger = executor.ledger
            assert ledger is not None
            assert ledger.statistics().requeued + ledger.statistics().restored < 60


@pytest.mark.parametrize("policy", ["wait", "requeue", "drop", "keep"])
async def test_a_finished_group_that_is_too_old_now_is_the_policys(
    autojump_clock: Clock, tmp_path: Path, policy: str
) -> None:
    """The bound may be stricter in the next life, or versions may have gone on without batches."""
    workflow = Counted()
    async with open_run(tmp_path, straggler_policy=policy, consumer_batch_size=2) as run:
        async with run.life(max_staleness=5) as executor:
            loader = prompt_list(20)
            await train(executor, loader, workflow, 1)
            state = await executor.state_dict()
            await trio.sleep(20)
        before = workflow.runs.copy()
        state["version"] = 4  # the trainer went on alone
        async with run.life(state, max_staleness=1) as executor:
            batch = await executor.prepare_batch(loader, workflow)
            if policy == "keep":
                assert batch.staleness().max() > 1
                assert executor.staleness_violations == 2
                assert workflow.runs == before
                return
            assert batch.staleness().max() <= 1
            again = [p for p in before if workflow.runs[p] > before[p]]
            if policy == "requeue":
                assert again
            else:
                assert not again
                assert {f.outcome for f in batch.failures} == {Outcome.EXPIRED}
            await trio.sleep(5)
        async with run.life(state, max_staleness=1) as executor:
            later = await executor.prepare_batch(loader, workflow)
            assert later.staleness().max() <= 1


async def test_a_batch_that_nobody_got_is_given_back(autojump_clock: Clock, tmp_path: Path) -> None:
    loader, workflow = prompt_list(16), Instant()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            batch = await executor.prepare_batch(loader, workflow)
            executor.give_back(batch)
            again = await executor.prepare_batch(loader, workflow)
            assert (batch.number, again.number) == (0, 0)
            assert ids(again) == ids(batch)
            second = await executor.prepare_batch(loader, workflow)
            executor.give_back(again)  # out of turn
            assert (await executor.prepare_batch(loader, workflow)).number == 2
            await executor.ack(second)
        async with run.life() as executor:
            assert ids(await executor.prepare_batch(loader, workflow)) == ids(batch)


async def test_dynamic_batches_and_groups_go_through_it(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    def decide(prompt: Any) -> Any:
        return None if prompt["prompt_id"] % 2 else "accept"

    loader = prompt_list(24)
    async with open_run(tmp_path) as run:
        trained: list[str] = []
        state = None
        for _ in range(3):
            async with run.life(state) as executor:
                batch = await executor.prepare_batch(
                    loader, Instant(decide), group_size=2, dynamic_batch_size=True
                )
                trained += ids(batch)
                assert {len(group) for group in batch.groups} == {2}
                await advance(executor)
                state = await executor.state_dict()
        assert len(trained) == len(set(trained)) >= 3


# --- checkpoints and acknowledgements ------------------------------------------------------------


async def test_acknowledged_batches_do_not_come_back(autojump_clock: Clock, tmp_path: Path) -> None:
    loader, workflow = prompt_list(24), Counted()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            first = await executor.prepare_batch(loader, workflow)
            await advance(executor)
            await executor.ack(first)
            assert executor.ledger is not None
            assert executor.ledger.statistics().trimmed == 0
            second = await executor.prepare_batch(loader, workflow)
            await trio.sleep(5)
        async with run.life() as executor:
            await executor.recover(1)
            again = await executor.prepare_batch(loader, workflow)
            assert ids(again) == ids(second)
            assert again.number == 1


async def test_a_trainer_that_takes_batches_ahead_names_the_last_it_trained_on(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    loader, workflow = prompt_list(24), Counted()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            first = await executor.prepare_batch(loader, workflow)
            ahead = await executor.prepare_batch(loader, workflow)
            state = await executor.state_dict(first)
            await trio.sleep(5)
        async with run.life(state) as executor:
            assert ids(await executor.prepare_batch(loader, workflow)) == ids(ahead)


async def test_wrong_calls_say_what_to_do(autojump_clock: Clock, tmp_path: Path) -> None:
    loader, workflow = prompt_list(24), Instant()
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            batch = await executor.prepare_batch(loader, workflow)
            await advance(executor)
            state = await executor.state_dict()
            with pytest.raises(UsageError, match="comes first"):
                executor.load_state_dict(state)
            with pytest.raises(UsageError, match="only those of prepare_batch"):
                await executor.ack(Batch(groups=batch.groups, version=0))
        async with run.life() as executor:
            executor.load_state_dict(state)
            with pytest.raises(UsageError, match=r"call recover\(1, update\)"):
                await executor.prepare_batch(loader, workflow)
            with pytest.raises(UsageError, match=r"call recover\(1, update\)"):
                await executor.recover(0)
            await executor.recover(1)
            assert ids(await executor.prepare_batch(loader, workflow)) != ids(batch)
        other = Run(tmp_path / "other", run.fleet)
        async with other.life() as executor:
            with pytest.raises(LedgerError, match="belongs to another ledger"):
                executor.load_state_dict(state)
        async with open_executor(
            RolloutConfig(servers=run.fleet.addresses), transport=run.fleet
        ) as executor:
            assert executor.ledger is None
            with pytest.raises(UsageError, match="ledger_path"):
                await executor.state_dict()
            with pytest.raises(UsageError, match="ledger_path"):
                executor.load_state_dict(state)
            with pytest.raises(UsageError, match="ledger_path"):
                await executor.ack(batch)


# --- cancellation --------------------------------------------------------------------------------


class CancelAt(trio.abc.Instrument):
    """Cancels a scope just before the n-th step of any task."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self.left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.left == 0:
            self.scope.cancel()
        self.left -= 1


@pytest.mark.parametrize("crash", [False, True])
async def test_a_trainer_cancelled_at_any_step_loses_nothing(
    autojump_clock: Clock, tmp_path: Path, crash: bool
) -> None:
    """Cancelled in the middle of a batch, a checkpoint or an acknowledgement, it goes on."""
    loader = prompt_list(16)
    for step in itertools.count():
        async with open_run(tmp_path, ledger_flush_s=0.1) as run:
            run.path = tmp_path / f"ledger-{step}"
            trained: list[str] = []
            saved: tuple[Any, list[str]] = (None, [])
            at = CancelAt(step)
            async with run.life() as executor:
                trio.lowlevel.add_instrument(at)
                with at.scope:
                    for _ in range(2):
                        batch = await executor.prepare_batch(loader, Instant())
                        trained += ids(batch)
                        await advance(executor)
                        saved = (await executor.state_dict(), list(trained))
                        await executor.ack(batch)
                trio.lowlevel.remove_instrument(at)
                if not crash:
                    version = executor.get_version()
                    if len(trained) // 4 > version:  # cancelled while the weights were brought
                        await advance(executor)
                    trained += await train(executor, loader, Instant())
                    assert executor.ledger is not None
                    await executor.ledger.flush()
                    assert executor.ledger.statistics().batch == 3
            if crash:
                state, trained = saved
                async with run.life(state) as executor:
                    if state is None:
                        await executor.recover(0, WeightUpdate.from_disk(checkpoint(0), 0))
                    trained += await train(executor, loader, Instant())
            assert sorted(map(int, trained)) == list(range(16)), step
        if at.left >= 0:
            assert step > 20
            return


# --- the data loader -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("stateful", [True, False])
async def test_the_loader_goes_on_where_it_was(
    autojump_clock: Clock, tmp_path: Path, batch: int, stateful: bool
) -> None:
    def new_loader() -> Any:
        return StatefulLoader(40, batch) if stateful else iter(StatefulLoader(40, batch))

    workflow = Counted()
    trained: list[str] = []
    async with open_run(tmp_path) as run:
        state = None
        for steps in (2, 1, 0, None):
            loader = new_loader()
            async with run.life(state) as executor:
                workflow_of = Instant()
                trained += await train(executor, loader, workflow_of, steps)
                if steps is not None:
                    state = await executor.state_dict()
                    assert (state["loader"] is not None) == stateful
                    await executor.prepare_batch(loader, workflow_of)  # lost
                    await trio.sleep(3)
    assert sorted(trained) == sorted(f"s{n}" for n in range(40))
    assert not workflow.runs


async def test_a_stateful_loader_is_not_read_from_its_beginning(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            await train(executor, StatefulLoader(400), Instant(), 20)
            state = await executor.state_dict()
        loader = StatefulLoader(400)
        async with run.life(state) as executor:
            await train(executor, loader, Instant(), 1)
        assert loader.reads < 40


@pytest.mark.parametrize("stateful", [True, False])
async def test_a_crash_in_the_next_epoch(
    autojump_clock: Clock, tmp_path: Path, stateful: bool
) -> None:
    """The checkpoint is of one epoch, and the crash in a later one."""

    def new_loader() -> Any:
        return StatefulLoader(16, 3) if stateful else prompt_list(16)

    epochs: list[list[str]] = [[], []]
    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            loader = new_loader()
            epochs[0] += await train(executor, loader, Instant(), 2)
            state = await executor.state_dict()
            await train(executor, loader, Instant())  # to the end, and lost
            await train(executor, loader, Instant(), 1)  # of the next epoch, and lost
            await trio.sleep(3)
        async with run.life(state) as executor:
            loader = new_loader()
            for epoch in epochs:
                epoch += await train(executor, loader, Instant())
            between = await executor.state_dict()
            assert (between["epoch"], between["position"]) == (2, 0)
        async with run.life(between) as executor:
            assert len(await train(executor, new_loader(), Instant())) == 16
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 16


async def test_another_loader_is_refused(autojump_clock: Clock, tmp_path: Path) -> None:
    def unnamed(first: int, count: int = 40) -> Sequence[Any]:
        return [{"input_ids": [first + n]} for n in range(count)]

    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            await executor.prepare_batch(unnamed(5), Instant())
            await trio.sleep(3)
        async with run.life() as executor:
            with pytest.raises(LedgerError, match="read past 0 of them and gave another one"):
                await train(executor, unnamed(6), Instant())
        async with run.life() as executor:
            with pytest.raises(LedgerError, match="read past 7 of them and ended"):
                await train(executor, unnamed(5, 7), Instant())
        async with run.life() as executor:
            with pytest.raises(TypeError, match="not iterable"):
                await executor.prepare_batch(5, Instant())  # type: ignore[arg-type]
            assert len(await executor.prepare_batch(unnamed(5), Instant())) == 4


async def test_a_loader_that_breaks_while_it_is_read_past_can_be_read_again(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    class Flaky:
        broken = False

        def __init__(self) -> None:
            self.prompts = iter(prompt_list(24))

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            if self.broken:
                self.broken = False
                raise OSError("the loader's own")
            prompt = next(self.prompts)
            self.broken = prompt["prompt_id"] == 3
            return prompt

    async with open_run(tmp_path) as run:
        async with run.life() as executor:
            await executor.prepare_batch(prompt_list(24), Instant())
            await trio.sleep(3)
        async with run.life() as executor:
            loader = Flaky()
            with pytest.raises(OSError, match="the loader's own"):
                await train(executor, loader, Instant())
            assert len(set(await train(executor, loader, Instant()))) >= 16


async def test_a_prompt_that_can_not_be_written_is_an_error_and_no_prompt_is_lost(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    class Thing:
        pass

    bad: dict[str, Any] = {"prompt_id": "bad", "image": Thing()}
    loader = [*prompt_list(3), bad, *prompt_list(12)[4:]]
    async with open_run(tmp_path) as run, run.life() as executor:
        with pytest.raises(UsageError, match=r"\['image'\] is of type Thing"):
            await executor.prepare_batch(loader, Instant())
        bad["image"] = "a path"
        trained = await train(executor, loader, Instant())
        assert sorted(trained) == sorted(["bad", *(str(n) for n in range(12) if n != 3)])


# --- trouble -------------------------------------------------------------------------------------


async def test_a_full_disk_ends_the_wait_and_delivers_nothing_until_there_is_room(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    puppet = Puppet()
    async with open_run(tmp_path) as run, run.life() as executor:
        assert executor.ledger is not None
        database = executor.ledger._file._db
        loader = [{"prompt_id": n, "text": "x" * 20_000} for n in range(8)]
        errors: list[LedgerError] = []

        async def wait() -> None:
            with pytest.raises(LedgerError, match="no room left") as caught:
                await executor.prepare_batch(loader, puppet)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await settled()
            database.execute("PRAGMA max_page_count = 8")
            await trio.sleep(2)
        puppet.end_all()
        await settled()
        await wait()  # though all groups are there
        assert len(errors) == 2
        with pytest.raises(LedgerError, match="no room left"):
            await executor.state_dict()
        database.execute("PRAGMA max_page_count = 1000000")
        await trio.sleep(2)
        assert len(await executor.prepare_batch(loader, puppet)) == 4
        state = await executor.state_dict()
        assert state["batch"] == 0


# --- the synchronous face ------------------------------------------------------------------------


async def test_a_ledgers_own_state_is_not_enough(autojump_clock: Clock, tmp_path: Path) -> None:
    async with open_run(tmp_path) as run, run.life() as executor:
        assert executor.ledger is not None
        await executor.begin()
        state = await executor.ledger.state_dict(0)
        place = {"epoch": 0, "position": 0, "ahead": [], "loader": None, "ended": False}
        wrong: list[Any] = [state, None, {**state, **place, "epoch": "x"},
                            {**state, **place, "ahead": [5]}]  # fmt: skip
        for given in wrong:
            with pytest.raises(UsageError, match="without the data loader's place"):
                executor.load_state_dict(given)


def no_room(rollout: RolloutController) -> None:
    ledger = rollout._live.ledger
    assert ledger is not None
    ledger._file._db.execute("PRAGMA max_page_count = 8")


def test_a_trainers_thread_is_told_of_a_ledger_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("notes")
    weights = save_weights(tmp_path, 1)
    with two_processes(weights, "--max-num-seqs", "8") as servers:
        config = RolloutConfig(
            servers=[servers[0].url], ledger_path=str(tmp_path / "ledger"), ledger_flush_s=60
        )
        with pytest.raises(LedgerError, match="no ledger at all"), RolloutController(config):
            pass
        (tmp_path / "ledger").unlink()
        loader = [{"prompt_id": n, "text": "x" * 50_000} for n in range(40)]

        def train(error: Exception | None) -> None:
            with RolloutController(config) as rollout:
                rollout.prepare_batch(loader, Instant())
                no_room(rollout)
                if error is not None:
                    raise error

        with pytest.raises(LedgerError, match="no room left"):
            train(None)
        with pytest.raises(KeyError, match="mine"):
            train(KeyError("mine"))


def test_the_face_for_a_trainers_thread(tmp_path: Path) -> None:
    with two_processes(save_weights(tmp_path, 1), "--max-num-seqs", "8") as servers:
        config = RolloutConfig(
            servers=[server.url for server in servers],
            consumer_batch_size=4,
            max_staleness=1,
            ledger_path=tmp_path / "ledger",  # type: ignore[arg-type]
        )
        loader = StatefulLoader(20, 3)
        with RolloutController(config) as rollout:
            first = rollout.prepare_batch(loader, Instant())
            rollout.set_version(1)
            state = rollout.state_dict()
            assert (state["batch"], state["version"], state["epoch"]) == (0, 1, 0)
            rollout.prepare_batch(loader, Instant())
            rollout.ack(first)
            assert rollout.ledger_statistics().acknowledged == 0
        loader = StatefulLoader(20, 3)
        with RolloutController(config) as rollout:
            rollout.load_state_dict(state)
            rollout.recover(1)
            trained = ids(first)
            for batch in rollout.batches(loader, Instant()):
                trained += ids(batch)
                rollout.set_version(rollout.get_version() + 1)
        assert sorted(trained) == sorted(f"s{n}" for n in range(20))
