"""The synchronous face: a trainer's thread, its interrupts, and the end of the trio side."""

from __future__ import annotations

import inspect
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio import controller as module
from arealtrio.config import RolloutConfig
from arealtrio.controller import RolloutController
from arealtrio.embedded.serve import ServerSettings, running_server
from arealtrio.errors import (
    NoServerAvailable,
    RolloutClosed,
    RolloutCrashed,
    StalenessBudgetExhausted,
    TooManyFailures,
    UsageError,
)
from arealtrio.executor import WorkflowExecutor
from arealtrio.testing import SimulatedFleet, SimulatedServerSettings
from arealtrio.types import GenerationHyperparameters, Outcome
from arealtrio.weights import WeightUpdate

from .embedded_server import MAX_MODEL_LEN, save_weights
from .faulty import Faulty, refuses
from .puppet import Generates, Instant, Prompt, Puppet, check_counts, prompt_list, prompts, raises

# Set where a thread is to end soon whatever the machine's load; nothing here waits for its end.
SOON_S = 20


@contextmanager
def controller(**config: Any) -> Iterator[RolloutController]:
    """A controller of one server in memory: it answers, and nobody generates."""
    fleet = SimulatedFleet([SimulatedServerSettings()])
    chosen = {"consumer_batch_size": 4, **config}
    with RolloutController(
        RolloutConfig(servers=fleet.addresses, **chosen), transport=fleet
    ) as rollout:
        yield rollout


def on_trio_side(rollout: RolloutController, function: Callable[..., Any], *args: Any) -> Any:
    return trio.from_thread.run(function, *args, trio_token=rollout._token)


def until(rollout: RolloutController, holds: Callable[[WorkflowExecutor], bool]) -> None:
    """Return once the trio side is in some state, and has come to rest."""

    async def wait() -> None:
        assert rollout._executor is not None
        while not holds(rollout._executor):  # noqa: ASYNC110 - another thread makes the state
            await trio.sleep(0.001)
        await trio.testing.wait_all_tasks_blocked()

    on_trio_side(rollout, wait)


def until_waiting(rollout: RolloutController, waiters: int = 1) -> None:
    until(rollout, lambda executor: len(executor._waiting._waiters) >= waiters)


def end_all(rollout: RolloutController, puppet: Puppet) -> None:
    async def end() -> None:
        puppet.end_all()

    on_trio_side(rollout, end)


class Background:
    """A call in another thread, and its end."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._end: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._end.put((self._function(), None))
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self._end.put((None, exc))

    def result(self) -> Any:
        value, error = self._end.get(timeout=SOON_S)
        self._thread.join()
        if error is not None:
            raise error
        return value


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "arealtrio"]


# --- status, recovery ----------------------------------------------------------------------------


def test_status_tells_a_trainers_thread_what_runs_and_what_waits() -> None:
    puppet = Puppet()
    with controller(max_concurrent_rollouts=1) as rollout:
        for number in range(2):
            rollout.submit({"prompt_id": number}, puppet)
        until(rollout, lambda _: puppet.started == [0])
        status = rollout.status()
        assert (status.admission.queued, status.admission.running_members) == (1, 1)
        assert status.admission.blocked_by
        assert max(map(len, str(status).splitlines())) <= 80


def test_a_restarted_trainer_goes_on_at_its_version() -> None:
    with controller(max_staleness=1) as rollout:
        assert rollout.recover(7).version == rollout.get_version() == 7
        assert rollout.get_capacity() > 0
        batch = rollout.prepare_batch(prompts(), Instant())
        assert batch.version == 7
        assert {group.head_version for group in batch.groups} == {7}


# --- a training loop -----------------------------------------------------------------------------


def test_a_training_loop() -> None:
    with controller(max_staleness=1) as rollout:
        loader = prompt_list(10)
        sizes = []
        for batch in rollout.batches(loader, Instant(), group_size=2):
            sizes.append(len(batch))
            assert batch.version == rollout.get_version() == len(sizes) - 1
            rollout.set_version(batch.version + 1)
        assert sizes == [4, 4, 2]
        assert rollout.rollout_counts()["accepted"] == 10
        assert rollout.staleness_violations == 0
    assert not threads()


def test_prepare_batch_ends_an_epoch_with_stop_iteration_and_begins_the_next() -> None:
    with controller() as rollout:
        loader = prompt_list(2)
        for version in range(2):
            assert len(rollout.prepare_batch(loader, Instant())) == 2
            with pytest.raises(StopIteration):
                rollout.prepare_batch(loader, Instant())
            rollout.set_version(version + 1)


def test_the_executor_has_every_method_with_the_same_arguments() -> None:
    names = [name for name in dir(RolloutController) if not name.startswith("_")]
    assert [name for name in names if not hasattr(WorkflowExecutor, name)] == []
    for name in names:
        ours, theirs = getattr(RolloutController, name), getattr(WorkflowExecutor, name)
        assert callable(ours) == callable(theirs)
        if callable(ours):
            assert arguments_of(ours) == arguments_of(theirs)


def arguments_of(method: Callable[..., object]) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(method).parameters.values()
    return [(one.name, one.kind, one.default) for one in parameters]


def test_every_method_reaches_the_executor() -> None:
    with controller(consumer_batch_size=8) as rollout:
        name = rollout.submit({"prompt_id": 1}, Instant())
        assert rollout.wait_for_task(name).outcome is Outcome.ACCEPTED
        rollout.submit({}, Instant(), is_eval=True)
        assert len(rollout.wait(1, is_eval=True)) == 1
        assert len(rollout.rollout_batch(prompt_list(2), Instant())) == 2
        assert rollout.get_capacity() == 5
        rollout.pause()
        rollout.submit({}, Instant())
        with pytest.raises(TimeoutError, match="0 of 1"):
            rollout.wait(1, timeout_s=0.01)
        rollout.drain()
        rollout.resume()
        assert len(rollout.wait(1)) == 1
        assert rollout.update_weights(WeightUpdate.label(3)).version == 3
        assert rollout.health() == {"http://server-0": None}
        (server,) = rollout.statistics()
        assert server.version == 3


def test_errors_are_the_executors_own() -> None:
    with controller(max_consecutive_failures=3, consumer_batch_size=2) as rollout:
        with pytest.raises(TooManyFailures) as caught:
            rollout.prepare_batch(prompts(), Instant(raises(KeyError("k"))))
        assert {type(cause) for cause in caught.value.exceptions} == {KeyError}
        with pytest.raises(StalenessBudgetExhausted):
            rollout.rollout_batch(prompt_list(3), Instant())
        with pytest.raises(UsageError, match="would never end"):
            rollout.wait(1)
        with pytest.raises(UsageError, match="never submitted"):
            rollout.wait_for_task("unknown")
        with pytest.raises(UsageError, match="arun_episode"):
            rollout.submit({}, object())  # type: ignore[arg-type]


def test_the_loader_is_iterated_in_the_callers_thread_and_its_error_is_its_own() -> None:
    where = []

    def loader() -> Iterator[Prompt]:
        for prompt in prompts(6):
            where.append(threading.current_thread())
            yield prompt

    class Stumbles:
        def __init__(self) -> None:
            self.source = loader()
            self.stumbled = False

        def __iter__(self) -> Iterator[Prompt]:  # where a loader starts its workers
            where.append(threading.current_thread())
            return self

        def __next__(self) -> Prompt:
            if len(where) == 3 and not self.stumbled:
                self.stumbled = True
                raise OSError("the disk")
            return next(self.source)

    with controller(consumer_batch_size=3) as rollout:
        source = Stumbles()
        with pytest.raises(OSError, match="the disk"):
            rollout.prepare_batch(source, Instant())
        batch = rollout.prepare_batch(source, Instant())
        assert sorted(g.prompt_id for g in batch.groups) == ["0", "1", "2"]
        rollout.set_version(1)
        batch = rollout.prepare_batch(source, Instant())
        assert sorted(g.prompt_id for g in batch.groups) == ["3", "4", "5"]
    assert set(where) == {threading.current_thread()}


def test_three_threads_steal_nothing_from_each_other() -> None:
    with controller(consumer_batch_size=64) as rollout:
        names = [rollout.submit({"prompt_id": i}, Instant(), task_id=f"t{i}") for i in range(30)]
        for i in range(10):
            rollout.submit({"prompt_id": i}, Instant(), task_id=f"e{i}", is_eval=True)
        mine = names[::3]
        others = [name for name in names if name not in mine]
        by_task = Background(lambda: [rollout.wait_for_task(name).task_id for name in mine])
        assert by_task.result() == mine
        by_count = [Background(lambda: rollout.wait(10)) for _ in range(2)]
        evaluated = Background(lambda: rollout.wait(10, is_eval=True))
        taken = [r.task_id for call in by_count for r in call.result()]
        assert sorted(taken) == sorted(others)
        assert len(evaluated.result()) == 10


def test_three_threads_that_wait_at_once_each_get_their_own() -> None:
    """One waits for any, one for tasks by name, one for evaluation, while rollouts end."""
    with controller(consumer_batch_size=64, straggler_policy="keep") as rollout:
        puppet = Puppet()
        for i in range(30):
            rollout.submit({"prompt_id": f"t{i}"}, puppet, task_id=f"t{i}")
        for i in range(10):
            rollout.submit({"prompt_id": f"e{i}"}, puppet, task_id=f"e{i}", is_eval=True)
        mine = [f"t{i}" for i in range(0, 30, 3)]
        by_name = [Background(partial(rollout.wait_for_task, name, SOON_S)) for name in mine]
        until_waiting(rollout, len(mine))  # what they wait for is nobody else's
        any_of = Background(lambda: [rollout.wait(5, SOON_S) for _ in range(4)])
        evaluated = Background(lambda: rollout.wait(10, SOON_S, is_eval=True))
        until_waiting(rollout, len(mine) + 2)

        async def end() -> None:
            for i in random.Random(5).sample(range(40), 40):
                puppet.end(f"t{i}" if i < 30 else f"e{i - 30}")
                await trio.testing.wait_all_tasks_blocked()

        on_trio_side(rollout, end)
        assert [call.result().task_id for call in by_name] == mine
        taken = [result.task_id for results in any_of.result() for result in results]
        assert sorted(taken) == sorted({f"t{i}" for i in range(30)} - set(mine))
        assert sorted(r.task_id for r in evaluated.result()) == [f"e{i}" for i in range(10)]
        with pytest.raises(UsageError, match="would never end"):
            rollout.wait(1)


# --- starting and closing ------------------------------------------------------------------------


def test_a_start_that_fails_raises_what_happened() -> None:
    config = RolloutConfig(servers=["http://127.0.0.1:9"], setup_timeout_s=0.05)
    rollout = RolloutController(config)
    with pytest.raises(NoServerAvailable, match=r"127\.0\.0\.1:9"):
        rollout.__enter__()
    assert not threads()
    with pytest.raises(RolloutCrashed):
        rollout.get_version()


def test_a_server_that_is_not_usable_is_named_at_the_start() -> None:
    fleet = SimulatedFleet([SimulatedServerSettings()])
    faulty = Faulty(fleet)
    faulty.fault = refuses("/health")
    config = RolloutConfig(servers=fleet.addresses)
    with pytest.raises(NoServerAvailable, match="server-0: not usable"):
        RolloutController(config, transport=faulty).__enter__()
    assert not threads()


def test_ctrl_c_while_it_starts_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def get(self) -> None:
            raise KeyboardInterrupt

        def put(self, _: object) -> None:
            pass

    rollout = RolloutController(RolloutConfig(servers=["http://127.0.0.1:9"], setup_timeout_s=3600))
    monkeypatch.setattr(rollout, "_started", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        rollout.__enter__()
    assert not threads()


def test_calls_before_entering_and_a_second_entry_are_refused() -> None:
    rollout = RolloutController(RolloutConfig(servers=["http://127.0.0.1:9"]))
    for call in (rollout.get_version, rollout.pause, lambda: rollout.wait(1)):
        with pytest.raises(UsageError, match="enter the controller first"):
            call()
    rollout.close()
    with controller() as entered, pytest.raises(UsageError, match="entered once"):
        entered.__enter__()


def test_use_after_close_is_refused_and_closing_twice_is_not() -> None:
    with controller() as rollout:
        rollout.submit({}, Puppet())
    rollout.close()
    for call in (
        lambda: rollout.wait(1),
        lambda: rollout.submit({}, Instant()),
        lambda: rollout.prepare_batch(prompts(), Instant()),
        lambda: rollout.rollout_batch([], Instant()),
        lambda: rollout.update_weights(WeightUpdate.label(1)),
        rollout.get_version,
        rollout.rollout_counts,
    ):
        with pytest.raises(RolloutClosed):
            call()
    assert not threads()
    assert rollout._executor is not None
    check_counts(rollout._executor)
    assert rollout._executor.counts.of(Outcome.CANCELLED) == 1


def test_closing_wakes_the_threads_that_wait() -> None:
    with controller() as rollout:
        rollout.submit({}, Puppet(), task_id="a")
        rollout.submit({}, Puppet(), task_id="b")
        calls = [
            Background(lambda: rollout.wait(1)),
            Background(lambda: rollout.wait_for_task("b")),
            Background(lambda: rollout.prepare_batch(prompts(), Puppet())),
            Background(lambda: rollout.rollout_batch(prompt_list(1), Puppet())),
        ]
        until_waiting(rollout, 4)
        rollout.close()
        for call in calls:
            with pytest.raises(RolloutClosed):
                call.result()
    assert not threads()


def test_closing_wakes_a_thread_in_the_middle_of_a_weight_update() -> None:
    with controller() as rollout:
        entered = threading.Event()

        async def never(*_: Any) -> None:
            entered.set()
            await trio.sleep_forever()

        assert rollout._executor is not None
        rollout._executor.update_weights = never  # type: ignore[method-assign,assignment]
        call = Background(lambda: rollout.update_weights(WeightUpdate.label(1)))
        assert entered.wait(SOON_S)
        rollout.close()
        with pytest.raises(RolloutClosed):
            call.result()


def test_an_error_in_the_block_closes_it() -> None:
    with pytest.raises(ZeroDivisionError), controller() as rollout:  # noqa: PT012
        rollout.submit({}, Puppet())
        raise ZeroDivisionError
    assert not threads()


# --- the end of the trio side --------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_trio_side_that_dies_gives_an_ordinary_error_with_its_cause(
    error: BaseException,
) -> None:
    with controller() as rollout:
        rollout.submit({"prompt_id": 1}, Puppet())
        call = Background(lambda: rollout.wait(1))
        until_waiting(rollout)

        async def fail() -> None:
            raise error

        async def die() -> None:
            assert rollout._executor is not None
            rollout._executor._nursery.start_soon(fail)

        on_trio_side(rollout, die)
        with pytest.raises(RolloutCrashed, match=type(error).__name__) as caught:
            call.result()
        assert isinstance(caught.value, Exception)
        cause = caught.value.__cause__
        while isinstance(cause, BaseExceptionGroup):
            (cause,) = cause.exceptions
        assert type(cause) is type(error)
        for later in (lambda: rollout.wait(1), rollout.get_version, rollout.pause):
            with pytest.raises(RolloutCrashed):
                later()
    assert not threads()


# --- interrupts ----------------------------------------------------------------------------------


@contextmanager
def ctrl_c(rollout: RolloutController, waiters: int = 1) -> Iterator[None]:
    """Send SIGINT to the main thread once its call waits on the trio side."""
    main = threading.main_thread()
    assert threading.current_thread() is main
    assert main.ident is not None
    ident = main.ident

    def interrupt() -> None:
        until_waiting(rollout, waiters)
        signal.pthread_kill(ident, signal.SIGINT)

    background = Background(interrupt)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, previous)
        background.result()


def test_ctrl_c_in_wait_loses_nothing() -> None:
    with controller() as rollout:
        puppet = Puppet()
        for prompt in prompts(3):
            rollout.submit(prompt, puppet)
        with ctrl_c(rollout):
            rollout.wait(3)
        end_all(rollout, puppet)
        assert [r.prompt_id for r in rollout.wait(3)] == ["0", "1", "2"]


def test_ctrl_c_in_wait_for_task_loses_nothing() -> None:
    with controller() as rollout:
        puppet = Puppet()
        rollout.submit({"prompt_id": 1}, puppet, task_id="a")
        with ctrl_c(rollout):
            rollout.wait_for_task("a")
        end_all(rollout, puppet)
        assert rollout.wait_for_task("a").outcome is Outcome.ACCEPTED


def test_ctrl_c_in_prepare_batch_loses_nothing() -> None:
    with controller() as rollout:
        puppet, loader = Puppet(), prompts()
        with ctrl_c(rollout):
            rollout.prepare_batch(loader, puppet)
        end_all(rollout, puppet)
        batch = rollout.prepare_batch(loader, puppet)
        assert sorted(g.prompt_id for g in batch.groups) == ["0", "1", "2", "3"]


def test_ctrl_c_in_rollout_batch_cancels_it() -> None:
    with controller() as rollout:
        with ctrl_c(rollout):
            rollout.rollout_batch(prompt_list(3), Puppet())
        rollout.drain()
        assert rollout.rollout_counts()["cancelled"] == 3
        assert rollout.get_capacity() == 4


def test_ctrl_c_in_the_loader_loses_no_prompt() -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.source = prompts(8)
            self.reads = 0

        def __iter__(self) -> Iterator[Prompt]:
            return self

        def __next__(self) -> Prompt:
            self.reads += 1
            if self.reads == 4:
                raise KeyboardInterrupt
            return next(self.source)

    with controller() as rollout:
        loader = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            rollout.prepare_batch(loader, Instant())
        seen = []
        for batch in rollout.batches(loader, Instant()):
            seen += sorted(int(g.prompt_id) for g in batch.groups)
            rollout.set_version(batch.version + 1)
        assert seen == list(range(8))


def test_a_prompt_that_was_read_and_not_handed_over_is_handed_over_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with controller() as rollout:
        loader = prompt_list(8)

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(rollout, "_feed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                rollout.prepare_batch(loader, Instant())
        seen = []
        for batch in rollout.batches(loader, Instant()):
            seen += sorted(int(g.prompt_id) for g in batch.groups)
            rollout.set_version(batch.version + 1)
        assert seen == list(range(8))


@pytest.mark.parametrize("what", ["wait", "wait_for_task", "prepare_batch"])
def test_an_interrupt_that_comes_after_the_answer_gives_it_back(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with controller() as rollout:
        loader = prompts()
        rollout.submit({"prompt_id": "mine"}, Instant(), task_id="mine")

        def call() -> Any:
            if what == "wait":
                return [r.task_id for r in rollout.wait(1)]
            if what == "wait_for_task":
                return rollout.wait_for_task("mine").task_id

            return sorted(g.prompt_id for g in rollout.prepare_batch(loader, Instant()).groups)

        expected = {"wait": ["mine"], "wait_for_task": "mine", "prepare_batch": list("012")}
        if what == "prepare_batch":
            rollout.wait(1)
            rollout.set_version(1)
            expected["prepare_batch"] = list("0123")
        original = module._Call.wait
        interrupted: list[Any] = []

        def wait(self: Any) -> Any:
            value = original(self)
            if self._undo is not None and not isinstance(value, int) and not interrupted:
                interrupted.append(value)
                raise KeyboardInterrupt
            return value

        with monkeypatch.context() as patch:
            patch.setattr(module._Call, "wait", wait)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert interrupted
        assert call() == expected[what]


async def test_an_interrupt_between_the_answer_and_its_task_s_turn_gives_it_back() -> None:
    """The task was woken before, so no cancellation reaches it: it returns what it was given."""
    undone: list[str] = []
    call, woken = module._Call[str](undone.append), trio.Event()

    async def answer() -> str:
        await woken.wait()
        return "a batch"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run, answer, lambda: False)
        await trio.testing.wait_all_tasks_blocked()
        woken.set()
        call.abandon()
    assert undone == ["a batch"]


# --- user code on the trio side ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["workflow", "filter"])
def test_user_code_that_calls_the_controller_it_runs_in_is_told_so(where: str) -> None:
    """It waited for itself, and with it everything else."""
    with controller() as rollout:

        def ask(_: object) -> Any:
            rollout.get_capacity()

        filtered: dict[str, Any] = {"should_accept_fn": ask} if where == "filter" else {}
        rollout.submit({}, Instant(ask if where == "workflow" else lambda _: "accept"), **filtered)
        (result,) = rollout.wait(1, timeout_s=SOON_S)
        assert result.failure is not None
        assert isinstance(result.failure.error, UsageError)
        assert "would wait for itself for ever" in str(result.failure.error)


def test_a_workflow_s_constructor_that_exits_costs_the_call_alone() -> None:
    class Exits(Instant):
        def __init__(self) -> None:
            raise SystemExit(3)

    with controller() as rollout:
        with pytest.raises(SystemExit):
            rollout.submit({}, Exits)
        rollout.submit({}, Instant())
        assert len(rollout.wait(1, timeout_s=SOON_S)) == 1


# --- fork ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_so_and_may_end_in_peace() -> None:
    with controller() as rollout:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for call in (rollout.get_version, lambda: rollout.wait(1), rollout.pause):
                    try:
                        call()
                    except UsageError as exc:
                        os.write(writer, b"refused " if "forked" in str(exc) else b"? ")
                rollout.close()
                os.write(writer, b"closed")
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        with os.fdopen(reader, "rb") as answers:
            assert answers.read() == b"refused refused refused closed"
        assert rollout.get_version() == 0


# --- real servers --------------------------------------------------------------------------------


@contextmanager
def server_in_a_thread(
    tmp_path: Path,
) -> Iterator[tuple[str, Callable[[Callable[[Any], Any]], Any]]]:
    """An embedded server over real HTTP: its URL, and a way to ask its scheduler something."""
    ready: SimpleQueue[Any] = SimpleQueue()
    stop = trio.Event()

    async def main() -> None:
        settings = ServerSettings(
            weights=save_weights(tmp_path, 1), max_model_len=MAX_MODEL_LEN, token_time_s=0.001
        )
        async with running_server(settings) as server:
            ready.put((server, trio.lowlevel.current_trio_token()))
            await stop.wait()

    thread = Background(lambda: trio.run(main))
    server, token = ready.get(timeout=SOON_S)

    def ask(question: Callable[[Any], Any]) -> Any:
        return trio.from_thread.run_sync(question, server.scheduler, trio_token=token)

    try:
        yield server.url, ask
    finally:
        token.run_sync_soon(stop.set)
        thread.result()


def test_over_real_http_a_loop_trains_and_nothing_runs_on_the_server_after_close(
    tmp_path: Path,
) -> None:
    short = GenerationHyperparameters(max_new_tokens=8, ignore_eos=True)
    with server_in_a_thread(tmp_path) as (url, ask):
        config = RolloutConfig(servers=[url], consumer_batch_size=3, max_staleness=1)
        with RolloutController(config) as rollout:
            loader = prompts()
            for version in range(2):
                batch = rollout.prepare_batch(loader, Generates(short), group_size=2)
                assert len(batch) == 3
                assert batch.padded()["input_ids"].shape == (6, 9)
                update = WeightUpdate.from_disk(save_weights(tmp_path, 2), version + 1)
                assert rollout.update_weights(update).updated == (url,)
            for prompt in prompts(3):
                rollout.submit(prompt, Generates(short.new(max_new_tokens=1000)), is_eval=True)

            until(
                rollout, lambda executor: any(r.outstanding for r in executor.engine.statistics())
            )
        assert ask(lambda scheduler: (scheduler.running, scheduler.waiting)) == ((), ())
    assert not threads()
