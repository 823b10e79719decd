"""Rewards in real processes: they hang, crash and raise; none outlives its pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trio
import trio.testing

from arealtrio.errors import (
    ConfigError,
    RewardCrashed,
    RewardError,
    RewardRaised,
    RewardTimedOut,
    RolloutClosed,
)
from arealtrio.reward import AsyncRewardWrapper, ProcessReward, RewardOutcome, RewardPool
from arealtrio.reward_worker import TRACEBACK_SIZE
from arealtrio.settlement import classify
from arealtrio.types import FailureKind, GenerationHyperparameters, ModelRequest, ModelResponse
from arealtrio.workflow import SingleTurnWorkflow

from . import rewards

ROOT = Path(__file__).parents[2]
LONG_S = 60.0  # longer than any test


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool's processes, which get our ``sys.path``, import ``tests.unit.rewards``.

    They import the main module too. Here that is pytest, which would take most of their time.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.delattr(sys.modules["__main__"], "__file__")


def workers() -> set[int]:
    """The processes under this one, but for multiprocessing's own resource tracker."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = workers()
    yield
    assert workers() <= before


@asynccontextmanager
async def small_pool(**settings: Any) -> AsyncIterator[RewardPool]:
    """One process, cold: a test pays for what it uses."""
    async with RewardPool(**({"max_workers": 1, "warm": False} | settings)) as pool:
        yield pool


def pid_in(path: Path) -> int:
    return int(path.read_text() or 0) if path.exists() else 0


async def written(path: Path) -> int:
    """Wait for the process id that a reward writes first; the file is outside, so it is polled."""
    with trio.fail_after(LONG_S):
        while not (process := pid_in(path)):  # noqa: ASYNC110
            await trio.sleep(0.01)
    return process


async def test_a_value_comes_back_from_another_process() -> None:
    async with small_pool() as pool:
        assert await pool.outcome(rewards.give, 0.5) == RewardOutcome(0.5)
        assert await pool.outcome(rewards.give, None) == RewardOutcome(None)
        assert await pool.run(rewards.give, np.float32(2)) == 2.0
        first = await pool.run(rewards.pid)
        assert first != os.getpid()
        assert await pool.run(rewards.pid) == first, "the process is kept"


async def test_what_is_no_reward_is_an_error_and_no_zero() -> None:
    async with small_pool() as pool:
        for wrong in ("1", float("nan"), [1.0]):
            outcome = await pool.outcome(rewards.give, wrong)
            assert type(outcome.error) is RewardError
            assert "rewards.give: a reward must be" in str(outcome.error)


async def test_a_callable_without_a_hash_is_a_reward_too() -> None:
    async with small_pool() as pool:
        for factor in (2.0, 3.0, 2.0):
            assert await ProcessReward(rewards.Scaled(factor), pool)(0.5) == factor / 2


async def test_any_keyword_reaches_the_function() -> None:
    """A prompt's data may have keys of any name; none is taken for an argument of ours."""
    names = ("self", "function", "timeout_s", "args", "kwargs", "job", "name", "pool")
    async with small_pool() as pool:
        reward = ProcessReward(rewards.keywords, pool)
        expected = float(sum(map(len, names)))
        assert await reward(**dict.fromkeys(names, 1)) == expected
        assert await pool.run(rewards.keywords, **dict.fromkeys(names, 1)) == expected


async def test_a_hanging_reward_is_killed_and_the_pool_goes_on(tmp_path: Path) -> None:
    async with small_pool() as pool:
        reward = ProcessReward(rewards.hang, pool, timeout_s=0.5)
        outcome = await reward.outcome(str(tmp_path / "pid"))
        assert isinstance(outcome.error, RewardTimedOut)
        assert "rewards.hang took longer than timeout_s=0.5" in str(outcome.error)
        assert not psutil.pid_exists(await written(tmp_path / "pid"))
        assert await pool.run(rewards.give, 1) == 1.0, "a new process, whose start is not timed"


async def test_a_crash_takes_only_its_own_process() -> None:
    async with small_pool() as pool:
        for function, args, exitcode, says in (
            (rewards.segfault, (), -signal.SIGSEGV, "was ended by SIGSEGV"),
            (rewards.leave, (7,), 7, "ended with exit status 7"),
        ):
            outcome = await pool.outcome(function, *args)
            assert isinstance(outcome.error, RewardCrashed)
            assert outcome.error.exitcode == exitcode
            assert says in str(outcome.error)
        assert await pool.run(rewards.give, 1) == 1.0


async def test_a_child_that_a_reward_forks_answers_nobody() -> None:
    """Its answer came first, and its parent's was taken for that of the next call."""
    async with small_pool() as pool:
        for status in (3, 0):
            assert await pool.run(rewards.fork, status) == float(status)
            assert await pool.run(rewards.give, 0.5) == 0.5


async def test_a_reward_may_use_multiprocessing() -> None:
    async with small_pool() as pool:
        assert await pool.run(rewards.grade_in_a_process, 0.5) == 0.5


@pytest.mark.parametrize("forked", [True, False])
async def test_nobody_waits_for_a_process_that_a_reward_started(
    tmp_path: Path, forked: bool
) -> None:
    """It outlives the reward's own, and what that shares with the pool must end with that."""
    async with small_pool(timeout_s=2.0) as pool:
        for end, error in (("return", None), ("hang", RewardTimedOut), ("crash", RewardCrashed)):
            path = tmp_path / end
            with trio.fail_after(20):
                outcome = await pool.outcome(rewards.start_and, end, str(path), forked=forked)
            os.kill(await written(path), signal.SIGKILL)
            assert (outcome.error and type(outcome.error)) is error


async def test_an_alarm_that_a_reward_leaves_behind_does_not_ring_in_the_next() -> None:
    async with small_pool() as pool:
        for then in ("", "no answer"):
            outcome = await pool.outcome(rewards.leave_an_alarm, then=then)
            assert (outcome.error is None) is (not then)
            assert await pool.run(rewards.nap, 0.4) == 1.0


async def test_an_exception_is_told_with_its_traceback_and_not_tried_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    async with small_pool() as pool:
        with pytest.raises(RewardRaised, match=r"rewards\.count raised ValueError") as caught:
            await pool.run(rewards.count, str(calls), then="the secret prompt")
        assert calls.read_text() == "x"
        assert "secret" not in str(caught.value), "no payload in a message"
        assert "rewards.py" in caught.value.remote_traceback
        assert caught.value.remote_traceback.strip() in caught.value.__notes__[0]
        same = await pool.run(rewards.pid)
        for function, kind in (
            (rewards.leave_politely, "SystemExit"),
            (rewards.raise_unpicklable, "LocalError"),
        ):
            with pytest.raises(RewardRaised, match=kind):
                await pool.run(function)
        assert await pool.run(rewards.pid) == same, "an exception costs no process"


async def test_of_a_traceback_of_any_length_its_head_and_its_end_are_told() -> None:
    async with small_pool() as pool:
        with pytest.raises(RewardRaised) as caught:
            await pool.run(rewards.raise_at_length, 10**7)
    told = caught.value.remote_traceback
    assert len(told) < TRACEBACK_SIZE + 100
    assert told.startswith("Traceback")
    assert "characters left out" in told
    assert told.endswith("the end\n")


async def test_cancellation_kills_the_process(tmp_path: Path) -> None:
    async with small_pool() as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run, rewards.hang, str(tmp_path / "pid"))
            process = await written(tmp_path / "pid")
            assert psutil.pid_exists(process)
            nursery.cancel_scope.cancel()
        assert not psutil.pid_exists(process)
        assert await pool.run(rewards.give, 1) == 1.0


async def test_a_rollout_cancelled_while_its_process_starts_leaves_none() -> None:
    async with small_pool() as pool:
        with trio.move_on_after(0.05) as scope:
            await pool.run(rewards.give, 1)
        assert scope.cancelled_caught
        assert not workers()
        assert await pool.run(rewards.give, 1) == 1.0


async def test_closing_kills_what_runs_and_tells_who_waits(tmp_path: Path) -> None:
    ends: list[BaseException] = []

    async def call(pool: RewardPool, *args: Any) -> None:
        try:
            await pool.run(*args)
        except RolloutClosed as exc:
            ends.append(exc)

    async with trio.open_nursery() as nursery:
        async with small_pool() as pool:
            nursery.start_soon(call, pool, rewards.hang, str(tmp_path / "pid"))
            await written(tmp_path / "pid")
            nursery.start_soon(call, pool, rewards.give, 1)  # waits for the process
            await trio.testing.wait_all_tasks_blocked()
        assert not workers()
    assert len(ends) == 2
    assert "was closed before" in str(ends[0])


async def test_no_more_than_max_workers_first_come_first_served() -> None:
    order: list[int] = []

    async def call(pool: RewardPool, number: int) -> None:
        await pool.run(rewards.nap, 0.01)
        order.append(number)

    async with small_pool() as pool:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(call, pool, number)
                await trio.testing.wait_all_tasks_blocked()
        assert order == list(range(12))
        assert len(workers()) == 1, [psutil.Process(p).cmdline() for p in workers()]


async def test_waiting_for_a_process_does_not_count_as_the_functions_time() -> None:
    async with small_pool() as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, rewards.nap, 1.1)
        await trio.testing.wait_all_tasks_blocked()
        assert await ProcessReward(rewards.give, pool, timeout_s=1.0)(1) == 1.0


async def test_a_warm_pool_has_its_processes_before_the_first_reward() -> None:
    pool = RewardPool(2, initializer=rewards.initialize)
    async with pool:
        there = workers()
        assert len(there) == 2
        assert await pool.run(rewards.was_initialized) == 1.0
        assert workers() == there


async def test_a_failing_initializer_fails_every_reward(caplog: pytest.LogCaptureFixture) -> None:
    async with small_pool(initializer=rewards.fail_to_initialize, warm=True) as pool:
        assert "could not be prepared: LookupError" in caplog.text
        for _ in range(2):
            with pytest.raises(RewardRaised) as caught:
                await pool.run(rewards.give, 1)
            assert "no such model" in caught.value.remote_traceback


async def test_a_process_that_is_not_ready_in_time_is_killed() -> None:
    async with small_pool(start_timeout_s=0.01) as pool:
        with pytest.raises(RewardError, match=r"start_timeout_s=0\.01"):
            await pool.run(rewards.give, 1)
        assert not workers()


async def test_an_idle_process_that_was_killed_is_replaced() -> None:
    async with small_pool() as pool:
        idle = int(await pool.run(rewards.pid) or 0)
        os.kill(idle, signal.SIGKILL)
        dead = partial(os.waitid, os.P_PID, idle, os.WEXITED | os.WNOWAIT)
        await trio.to_thread.run_sync(dead)  # it is only when all its threads are
        assert await pool.run(rewards.give, 1) == 1.0


def test_without_a_block_the_pool_ends_with_the_run() -> None:
    """As under a RolloutController, whose trainer makes the workflow before there is a run."""
    pool = RewardPool(1)
    reward = ProcessReward(rewards.pid, pool)

    async def run() -> float | None:
        reward.warm_up()
        return await reward()

    first, second = trio.run(run), trio.run(run)
    assert first != second, "each run has its own"
    assert not workers()


def test_a_run_that_ends_meanwhile_kills_what_runs(tmp_path: Path) -> None:
    reward = ProcessReward(rewards.hang, RewardPool(1))

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reward, str(tmp_path / "pid"))
            await written(tmp_path / "pid")
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup, match="nursery"):
        trio.run(run)
    assert not workers()


ORPHAN = """
import sys, trio
from arealtrio.reward import RewardPool
from tests.unit import rewards

async def main():
    async with RewardPool(1, warm=False) as pool:
        await pool.run(rewards.backtrack, sys.argv[1])

if __name__ == "__main__":
    trio.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere SIGIO does not end a process")
def test_a_killed_trainer_leaves_no_hanging_reward(tmp_path: Path) -> None:
    """Even one that holds its interpreter lock."""
    script = tmp_path / "trainer.py"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "pid")]
    trainer = subprocess.Popen(command, env=environment)
    try:
        reward = psutil.Process(trio.run(written, tmp_path / "pid"))
    finally:
        trainer.kill()
        trainer.wait()
    gone, alive = psutil.wait_procs([reward], LONG_S)
    assert (len(gone), alive) == (1, [])


def test_wrong_constructions_are_refused() -> None:
    pool = RewardPool(1)
    for wrong in (0, -1, 2.5, "4", True):
        for make in (RewardPool, partial(AsyncRewardWrapper, rewards.pid, 15.0)):
            with pytest.raises(ConfigError, match="max_workers must be an integer of at least 1"):
                make(wrong)  # type: ignore[arg-type]
    wrong_seconds: tuple[Any, ...] = (0.0, float("inf"), float("nan"), "15", True)
    for seconds in wrong_seconds:
        with pytest.raises(ConfigError, match="timeout_s"):
            RewardPool(1, timeout_s=seconds)
        with pytest.raises(ConfigError, match="start_timeout_s"):
            RewardPool(1, start_timeout_s=seconds)
        with pytest.raises(ConfigError, match="timeout_s"):
            ProcessReward(rewards.pid, pool, timeout_s=seconds)
    with pytest.raises(ConfigError, match="initializer can not be pickled"):
        RewardPool(1, initializer=lambda: None)
    with pytest.raises(ConfigError, match="not a lambda"):
        ProcessReward(lambda: 1.0, pool)
    with pytest.raises(ConfigError, match="callable"):
        ProcessReward("math", pool)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is async"):
        ProcessReward(pool.run, pool)
    with pytest.raises(ConfigError, match="max_retries must be 0"):
        AsyncRewardWrapper(rewards.pid, max_retries=3)
    with pytest.raises(ConfigError, match="timeout_s must be a finite number, not None"):
        RewardPool(1, timeout_s=None)  # type: ignore[arg-type]
    assert RewardPool().max_workers >= 1


async def test_arguments_that_can_not_be_pickled_are_named_and_not_shown() -> None:
    async with small_pool() as pool:
        with pytest.raises(RewardError, match=r"rewards\.give: its arguments can not be pickled"):
            await pool.run(rewards.give, lambda: "secret")
        assert not workers(), "no process was needed to find out"


class OneAnswer:
    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        await trio.lowlevel.checkpoint()
        return ModelResponse(
            rid=request.rid,
            input_tokens=request.input_ids,
            output_tokens=np.array([7, 8], dtype=np.int32),
            output_logprobs=np.zeros(2, dtype=np.float32),
            output_versions=np.zeros(2, dtype=np.int32),
            stop_reason="stop",
        )

    def get_version(self) -> int:
        return 0


def one_turn(reward: Callable[..., Any]) -> SingleTurnWorkflow:
    return SingleTurnWorkflow(reward, GenerationHyperparameters(max_new_tokens=2))


async def test_a_workflow_takes_it_and_no_reward_fails_the_rollout_as_the_users() -> None:
    async with small_pool() as pool:
        data = {"input_ids": [1], "answer": 4}
        row = await one_turn(ProcessReward(rewards.length, pool)).arun_episode(OneAnswer(), data)
        assert row is not None
        assert row.reward == 2.0
        with pytest.raises(RewardRaised) as caught:
            await one_turn(ProcessReward(rewards.give, pool)).arun_episode(OneAnswer(), data)
        assert classify(caught.value) is FailureKind.WORKFLOW


async def test_a_workflow_starts_the_processes_before_it_generates() -> None:
    class Watched:
        started = False

        def warm_up(self) -> None:
            self.started = True

        async def __call__(self, *_: Any, **__: Any) -> float:
            return 1.0

    reward = Watched()

    class Engine(OneAnswer):
        async def agenerate(self, request: ModelRequest) -> ModelResponse:
            assert reward.started
            return await super().agenerate(request)

    assert await one_turn(reward).arun_episode(Engine(), {"input_ids": [1]})


def test_areals_wrapper_raises_where_areal_trains_on_zero() -> None:
    async def run() -> None:
        quick = AsyncRewardWrapper(rewards.length, timeout_seconds=15, max_workers=1)
        assert await quick("", "", [1], [1, 2, 3], answer="3") == 3.0
        hanging = AsyncRewardWrapper(rewards.hang, timeout_seconds=0.2, max_workers=1)
        with pytest.raises(RewardTimedOut):
            await hanging()
        assert await quick("", "", [1], [1], answer="3") == 1.0
        assert len(workers()) == 1

    trio.run(run)
    assert not workers()
