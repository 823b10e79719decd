"""Ctrl-C, wherever it comes: everything has ended within a second. On the machine's own clock."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.admission import Admission
from arealtrio.config import RolloutConfig
from arealtrio.controller import RolloutController
from arealtrio.executor import WorkflowExecutor
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    simulated_executor,
)
from arealtrio.types import Outcome
from arealtrio.weights import WeightUpdate

from .puppet import Generates, Instant, Prompt, Puppet, check_counts, prompts
from .test_controller import Background, on_trio_side, threads, until, until_waiting

WITHIN_S = 1.0
ENDLESS = FixedLengths(100_000)
SLOW_SERVER = SimulatedServerSettings(token_time_s=0.5, load_time_s=3600)


@contextmanager
def sigint(when: Callable[[], None]) -> Iterator[Callable[[], float]]:
    """Send SIGINT to the main thread once ``when`` has returned, in another thread.

    Yields a function that says, afterwards, for how long everything has gone on since.
    """
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    sent: list[float] = []
    ended = threading.Event()

    def interrupt() -> None:
        try:
            when()
        finally:
            # Python does not notice a signal that comes just before it blocks on a lock.
            while not ended.is_set():
                sent[:] = [time.monotonic()]
                signal.pthread_kill(main, signal.SIGINT)
                ended.wait(5 * WITHIN_S)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    background = Background(interrupt)
    try:
        yield lambda: time.monotonic() - sent[0]
    finally:
        ended.set()
        background.result()
        signal.signal(signal.SIGINT, previous)


# --- in a trainer's thread -----------------------------------------------------------------------


def generating(executor: WorkflowExecutor) -> bool:
    return any(row.outstanding for row in executor.engine.statistics())


def waits(rollout: Any, _: Any) -> None:
    rollout.submit({"input_ids": [3]}, Generates())
    rollout.wait(1)


def waits_for_a_task(rollout: Any, _: Any) -> None:
    rollout.wait_for_task(rollout.submit({"input_ids": [3]}, Generates()))


def waits_for_a_batch(rollout: Any, _: Any) -> None:
    rollout.prepare_batch(prompts(), Generates(), group_size=2)


def runs_a_batch(rollout: Any, _: Any) -> None:
    rollout.rollout_batch(list(prompts(8)), Generates())


def updates_weights(rollout: Any, _: Any) -> None:
    rollout.submit({"input_ids": [3]}, Generates())
    rollout.update_weights(WeightUpdate.from_disk("/weights/1", 1))


def drains(rollout: Any, _: Any) -> None:
    rollout.submit({"input_ids": [3]}, Generates())
    rollout.drain()


def trains(rollout: Any, _: Any) -> None:
    rollout.submit({"input_ids": [3]}, Generates())
    while True:
        sum(range(1000))


def reads(rollout: Any, began: threading.Event) -> None:
    def loader() -> Iterator[Prompt]:
        yield from prompts(2)
        began.set()
        while True:
            sum(range(1000))

    rollout.submit({"input_ids": [3]}, Generates())
    rollout.prepare_batch(loader(), Generates())


@pytest.mark.parametrize(
    "call",
    [
        waits,
        waits_for_a_task,
        waits_for_a_batch,
        runs_a_batch,
        updates_weights,
        drains,
        trains,
        reads,
    ],
)
def test_a_trainer_that_is_interrupted_ends_with_all_that_it_started(
    call: Callable[[Any, threading.Event], None],
) -> None:
    began = threading.Event()
    fleet = SimulatedFleet([SLOW_SERVER], lengths=ENDLESS)
    rollout = RolloutController(
        RolloutConfig(servers=fleet.addresses, consumer_batch_size=4), transport=fleet
    )

    def when() -> None:
        assert began.wait(20)
        until(rollout, generating)
        if call is updates_weights:
            until(rollout, lambda executor: executor.engine.pool.update_lock.locked())
        elif call not in (trains, reads):
            until_waiting(rollout)

    with sigint(when) as since, pytest.raises(KeyboardInterrupt), rollout:  # noqa: PT012
        if call is not reads:
            began.set()
        call(rollout, began)
    assert since() < WITHIN_S
    assert not threads()
    assert sum(server.generations for server in fleet) == 0


@pytest.mark.parametrize("call", [waits_for_a_batch, updates_weights])
def test_a_server_that_answers_nothing_any_more_holds_nobody_up(
    call: Callable[[Any, Any], None],
) -> None:
    fleet = SimulatedFleet([SLOW_SERVER], lengths=ENDLESS)
    rollout = RolloutController(
        RolloutConfig(servers=fleet.addresses, consumer_batch_size=4), transport=fleet
    )

    async def hang() -> None:
        next(iter(fleet)).hang()

    def when() -> None:
        assert began.wait(20)
        until(rollout, generating)
        if call is updates_weights:
            until(rollout, lambda executor: executor.engine.pool.update_lock.locked())
        on_trio_side(rollout, hang)

    began = threading.Event()
    with sigint(when) as since, pytest.raises(KeyboardInterrupt), rollout:  # noqa: PT012
        began.set()
        call(rollout, None)
    assert since() < WITHIN_S
    assert not threads()


# --- in a program of trio ------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True])
def test_a_trio_program_that_is_interrupted_ends_with_all_that_it_started(busy: bool) -> None:
    """Whether the interrupt finds it idle, or in the code of a workflow that never awaits."""
    began = threading.Event()
    seen: list[Any] = []

    class Busy(Puppet):
        async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
            began.set()
            while True:
                sum(range(1000))

    async def main() -> None:
        async with simulated_executor(
            servers=[SLOW_SERVER], lengths=ENDLESS, consumer_batch_size=4
        ) as (executor, fleet):
            seen.extend([executor, fleet])
            for prompt in prompts(3):
                executor.submit(prompt, Generates())
            await trio.testing.wait_all_tasks_blocked()
            if busy:
                executor.submit({}, Busy(), is_eval=True)
            else:
                began.set()
            await executor.wait(1)

    def when() -> None:
        assert began.wait(20)

    with sigint(when) as since, pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert since() < WITHIN_S
    executor, fleet = seen
    assert executor.counts.of(Outcome.CANCELLED) == 3
    check_counts(executor)
    assert sum(server.generations for server in fleet) == 0
    assert sum(row.outstanding for row in executor.engine.statistics()) == 0


@pytest.mark.parametrize("step", ["next_member", "member_ended"])
def test_ctrl_c_within_our_bookkeeping_comes_after_it(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a rollout is counted as running that is not, and closing waits for it."""
    original, seen = getattr(Admission, step), list[WorkflowExecutor]()
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    once = [interrupt]

    def interrupted(admission: Admission, argument: Any) -> Any:
        if step == "member_ended" and once:
            once.pop()()
        result = original(admission, argument)
        if result is not None and once:  # a member that is counted, and not yet started
            once.pop()()
        return result

    async def main() -> None:
        async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
            seen.append(executor)
            for prompt in prompts(4):
                executor.submit(prompt, Instant())
            await trio.sleep_forever()

    monkeypatch.setattr(Admission, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    (executor,) = seen
    assert not once
    assert not executor._admission.running_members
    check_counts(executor)
