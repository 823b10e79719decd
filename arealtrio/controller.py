"""RolloutController: the executor for a trainer's ordinary thread.

The executor runs in one trio thread, and each method here is one call through the portal;
``prepare_batch`` is one for each handful of prompts, because the data loader is iterated in the
caller's thread. It contains no logic that an async user lacks. This is the only room with threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import outcome
import trio

from .arguments import RolloutArguments
from .batching import BatchStream, DataLoader
from .config import RolloutConfig
from .errors import LedgerError, RolloutClosed, RolloutCrashed, UsageError
from .executor import WorkflowExecutor, open_executor
from .group_policy import GroupPolicy
from .groups import AcceptFunction, WorkflowLike
from .ledger import LedgerStatistics
from .loader import Prompt
from .servers import ServerStatistics
from .settlement import RolloutResult
from .status import ExecutorStatus
from .trajectory import Batch
from .transport import Transport
from .types import PauseMode
from .weights import Chunk, WeightsGroup, WeightUpdate, WeightUpdateResult

T = TypeVar("T")


class _Question:
    """Something that the trio side asks the calling thread to do, while it waits for its answer.

    Args:
        function: What to call there.
        token: Of the trio side.
    """

    def __init__(self, function: Callable[[], object], token: trio.lowlevel.TrioToken) -> None:
        self._function = function
        self._token = token
        self._answered = trio.Event()
        self._result: outcome.Outcome[object] | None = None

    def answer(self) -> None:
        """Call it (in the caller's thread). What is no Exception interrupts the caller itself."""
        try:
            result: outcome.Outcome[object] = outcome.Value(self._function())
        except Exception as exc:  # noqa: BLE001 - it is raised where it was asked for
            result = outcome.Error(exc)
        with contextlib.suppress(trio.RunFinishedError):  # then nobody waits for it any more
            self._token.run_sync_soon(self._settle, result)

    def _settle(self, result: outcome.Outcome[object]) -> None:
        self._result = result
        self._answered.set()

    async def wait(self) -> object:
        """Wait for what it returned (on the trio side)."""
        await self._answered.wait()
        assert self._result is not None
        return self._result.unwrap()


class _Call(Generic[T]):
    """One call from a trainer's thread: runs on the trio side, answers through a queue.

    Args:
        undo: Called on the trio side with a result that the caller did not stay for.

    Attributes:
        over: Whether nobody waits for an answer any more: it was given, or the caller went away.
    """

    def __init__(self, undo: Callable[[T], None] | None = None) -> None:
        self.over = False
        self._undo = undo
        self._scope = trio.CancelScope()
        self._answer: SimpleQueue[outcome.Outcome[T] | _Question] = SimpleQueue()
        self._result: outcome.Outcome[T] | None = None
        self._abandoned = False

    async def run(
        self, function: Callable[[], Awaitable[T]], is_stopping: Callable[[], bool]
    ) -> None:
        """Await a function; put a result that nobody waits for back where it came from.

        A cancellation is no answer: either the caller went away, or the run ends, which answers
        every open call. ``trio.Cancelled`` must never reach a trainer's thread: it is a
        BaseException, and ``except Exception`` would be blind to it.
        """
        with self._scope, self._answering_errors(is_stopping):
            self._finish(outcome.Value(await function()))

    def run_now(self, function: Callable[[], T], is_stopping: Callable[[], bool]) -> None:
        """Call a function that does not wait: that needs no task, and no turn of the loop."""
        with self._answering_errors(is_stopping, BaseException):  # a SystemExit is the caller's too
            self._finish(outcome.Value(function()))

    @contextmanager
    def _answering_errors(
        self, is_stopping: Callable[[], bool], kind: type[BaseException] = Exception
    ) -> Iterator[None]:
        """Answer with an exception of the block, if it is of this kind.

        It is no answer that the executor closed, if nobody asked it to: it died, and the run's end
        will say of what.
        """
        try:
            yield
        except RolloutClosed as exc:
            if is_stopping():
                self._finish(outcome.Error(exc))
        except kind as exc:
            self._finish(outcome.Error(exc))

    def _finish(self, result: outcome.Outcome[T]) -> None:
        self.over = True
        self._result = result
        if self._abandoned:
            self._give_back()
        else:
            self._answer.put(result)

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless there is an answer."""
        if self._result is None:
            self._finish(outcome.Error(error))

    def abandon(self) -> None:
        """The caller went away (on the trio side)."""
        self.over = True
        self._abandoned = True
        self._scope.cancel()
        self._give_back()

    def _give_back(self) -> None:
        """Put the result back, once it is there: a task that was woken before ends all the same."""
        if isinstance(self._result, outcome.Value) and self._undo is not None:
            undo, self._undo = self._undo, None
            undo(self._result.value)

    def wait(self) -> T:
        """Block the caller's thread until there is an answer; do there what is asked meanwhile."""
        while isinstance(said := self._answer.get(), _Question):
            said.answer()
        return said.unwrap()

    async def in_callers_thread(self, function: Callable[[], object]) -> object:
        """Let the caller, who waits for the answer, call a function (asked on the trio side).

        Cancelled, it waits no longer; the function is not interrupted.
        """
        question = _Question(function, trio.lowlevel.current_trio_token())
        self._answer.put(question)
        return await question.wait()


class RolloutController:
    """Rollouts for a trainer that is an ordinary synchronous program.

    Use it as a context manager. Leaving it ends every rollout, on its server too, and the thread.
    Methods may be called from any thread; a wait that is interrupted (Ctrl-C, a time-out) takes
    nothing: what it would have returned is delivered by the next call.

    If the trainer's thread is busy in pure Python, the trio thread gets its turn only every
    ``sys.getswitchinterval()`` (5 ms); set it lower where that shows.

    Args:
        config: Limits and policies.
        transport: How bytes travel; None is real HTTP.

    Raises:
        NoServerAvailable: On entering, if a server is not ready within ``setup_timeout_s``.
        LedgerError: On entering, if the ledger can not be used; on leaving, if the last of it can
            not be written.
    """

    def __init__(self, config: RolloutConfig, *, transport: Transport | None = None) -> None:
        self.config = config
        self._transport = transport
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._token: trio.lowlevel.TrioToken | None = None
        self._executor: WorkflowExecutor | None = None
        self._started: SimpleQueue[BaseException | None] = SimpleQueue()
        self._stop = trio.Event()
        self._closing = False
        self._calls: set[_Call[Any]] = set()  # touched on the trio side only, until it has ended
        self._calls_lock = threading.Lock()
        self._ended = False
        self._crash: BaseException | None = None
        # While a thread has it the loader stands still, and so does its place on the trio side, but
        # for what was fed before. Reentrant, since a signal handler may run inside of a read.
        self._loader_lock = threading.RLock()
        self._reading = False
        self._feeding = False  # whether the trio side is still to take what was read

    # --- life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise UsageError("a controller is entered once; make a new one")
        self._thread = threading.Thread(target=self._run, name="arealtrio", daemon=True)
        self._thread.start()
        try:
            error = self._started.get()
        except BaseException:
            self.close()
            raise
        if error is not None:
            self._thread.join()
            raise error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if exc is None and isinstance(self._crash, LedgerError):
            raise self._crash  # what was not written is lost: that is not to end in silence

    def close(self) -> None:
        """End every rollout and the trio thread; waits in other threads raise RolloutClosed.

        May be called twice, and from any thread but its own.

        Raises:
            UsageError: From a workflow, a reward or a filter, whose end it would wait for.
        """
        thread = self._thread
        if thread is None or os.getpid() != self._pid:
            return
        self._check_usable()
        self._closing = True  # where there is no trio side yet to be told
        self._post(self._stop.set)
        thread.join()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:  # noqa: BLE001 - it reaches every waiting thread
            self._crash = _innermost(exc)
        finally:
            self._end_calls()
            self._started.put(self._crash)

    def _end_calls(self) -> None:
        with self._calls_lock:
            self._ended = True
            calls, self._calls = self._calls, set()
        for call in calls:
            call.fail(self._ended_error())

    def _ended_error(self) -> Exception:
        if self._crash is None:
            return RolloutClosed("the rollout controller is closed")
        crashed = isinstance(self._crash, RolloutCrashed)
        words = str(self._crash) if crashed else f"the rollout side died: {self._crash!r}"
        error = RolloutCrashed(words)
        error.__cause__ = self._crash.__cause__ if crashed else self._crash
        return error

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._closing:
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._cancel_when_stopped, nursery.cancel_scope)
            async with open_executor(self.config, transport=self._transport) as executor:
                self._executor = executor
                self._started.put(None)
                await trio.sleep_forever()

    async def _cancel_when_stopped(self, scope: trio.CancelScope) -> None:
        await self._stop.wait()
        if self._executor is not None:
            self._executor.close()  # first: it wakes every waiter with a clear error
        scope.cancel()

    # --- the portal --------------------------------------------------------------------------

    def _post(self, function: Callable[..., object], *args: object) -> bool:
        """Run a function on the trio side soon; False if there is none any more."""
        if self._token is None:
            return False
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def _call(
        self, function: Callable[[], Awaitable[T]], undo: Callable[[T], None] | None = None
    ) -> T:
        return self._answer_of(_Call(undo), self._start_call, function)

    def _answer_of(
        self, call: _Call[T], start: Callable[..., None], function: Callable[..., Any]
    ) -> T:
        self._check_usable()
        try:
            self._start(call, start, function)
            return call.wait()
        except BaseException:
            self._post(call.abandon)
            raise

    def _start(
        self, call: _Call[Any], start: Callable[..., None], function: Callable[..., Any]
    ) -> None:
        with self._calls_lock:
            if self._ended:
                raise self._ended_error()
            self._calls.add(call)
        if not self._post(start, call, function):
            raise self._ended_error()

    def _start_call(self, call: _Call[T], function: Callable[[], Awaitable[T]]) -> None:
        if self._stop.is_set():
            call.fail(self._ended_error())
        else:
            self._nursery.start_soon(self._run_call, call, function)

    async def _run_call(self, call: _Call[T], function: Callable[[], Awaitable[T]]) -> None:
        try:
            await call.run(function, self._stop.is_set)
        finally:
            self._forget(call)

    def _run_now(self, call: _Call[T], function: Callable[[], T]) -> None:
        if self._stop.is_set():
            call.fail(self._ended_error())
        else:
            call.run_now(function, self._stop.is_set)
        self._forget(call)

    def _forget(self, call: _Call[Any]) -> None:
        if call.over:  # else the end of the run answers it
            with self._calls_lock:
                self._calls.discard(call)

    def _ask(self, function: Callable[[WorkflowExecutor], T]) -> T:
        """Call a synchronous function on the trio side."""
        executor = self._live
        return self._answer_of(_Call(), self._run_now, lambda: function(executor))

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                "this process was forked from the one that opened the controller; use it there, "
                "or open another one here"
            )
        if threading.current_thread() is self._thread:
            raise UsageError(
                "a workflow, a reward or a filter called the controller that runs it, which would "
                "wait for itself for ever; use the engine that the workflow is given"
            )
        if self._thread is None:
            raise UsageError("enter the controller first: with RolloutController(config) as …")

    @property
    def _live(self) -> WorkflowExecutor:
        self._check_usable()
        if self._executor is None or self._ended:
            raise self._ended_error()
        return self._executor

    # --- rollouts ----------------------------------------------------------------------------

    def submit(
        self,
        data: Prompt,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        task_id: str | None = None,
        is_eval: bool = False,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
    ) -> str:
        """Queue one prompt, and return its task id at once. See ``WorkflowExecutor.submit``."""
        return self._ask(
            lambda executor: executor.submit(
                data,
                workflow,
                workflow_kwargs,
                should_accept_fn,
                task_id,
                is_eval,
                group_size,
                group_policy,
            )
        )

    def wait(
        self, count: int, timeout_s: float | None = None, *, is_eval: bool = False
    ) -> list[RolloutResult]:
        """Wait for ``count`` results of ``submit``. See ``WorkflowExecutor.wait``."""
        executor = self._live
        return self._call(
            lambda: executor.wait(count, timeout_s, is_eval=is_eval),
            undo=lambda results: executor.give_back_results(results, is_eval=is_eval),
        )

    def wait_for_task(self, task_id: str, timeout_s: float | None = None) -> RolloutResult:
        """Wait for one submission's result. See ``WorkflowExecutor.wait_for_task``."""
        executor = self._live
        is_eval = self._ask(lambda executor: executor.is_eval(task_id))
        return self._call(
            lambda: executor.wait_for_task(task_id, timeout_s),
            undo=lambda result: executor.give_back_results([result], is_eval=is_eval),
        )

    def rollout_batch(
        self,
        data: Sequence[Prompt],
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
    ) -> Batch:
        """Run these prompts to their ends. See ``WorkflowExecutor.rollout_batch``."""
        executor = self._live
        return self._call(
            lambda: executor.rollout_batch(
                data, workflow, workflow_kwargs, should_accept_fn, group_size, group_policy
            )
        )

    def prepare_batch(
        self,
        dataloader: DataLoader,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
        dynamic_batch_size: bool = False,
    ) -> Batch:
        """Return the next training batch. See ``WorkflowExecutor.prepare_batch``.

        The data loader is iterated in this thread, only inside this call.

        Raises:
            StopIteration: Where the async face raises StopAsyncIteration: the epoch has ended.
        """
        arguments = RolloutArguments.of(
            workflow, workflow_kwargs, should_accept_fn, group_size, group_policy
        )
        if self.config.ledger_path is not None:
            self._call(self._live.begin)
        stream = self._ask(
            lambda executor: executor.stream_of(dataloader, arguments, dynamic_batch_size)
        )
        while True:
            step = self._next_step(stream)
            if isinstance(step, Batch):
                if not step.groups:
                    raise StopIteration
                return step
            self._read(stream, step, arguments)

    def _next_step(self, stream: BatchStream) -> Batch | int:
        executor = self._live

        def undo(step: Batch | int) -> None:
            if isinstance(step, Batch):
                executor.give_back(step)

        return self._call(lambda: executor.next_step(stream), undo=undo)

    def _read(self, stream: BatchStream, count: int, arguments: RolloutArguments) -> None:
        """Read prompts and feed them. No other thread reads, or asks where the loader is."""
        with self._loader_lock:
            self._check_not_reading()
            if self._feeding:  # what another thread read; else next_step was after it
                self._ask(lambda executor: executor.closed)
            try:
                self._reading = True
                stream.feed.read(count)
            finally:
                self._reading = False
            self._feed(stream, count, arguments)

    def _check_not_reading(self) -> None:
        """With the loader's lock, another thread is not."""
        if self._reading:
            raise UsageError(
                "the data loader is being read by this thread, and where it is can not be said: "
                "call neither state_dict nor prepare_batch out of the loader itself; a signal "
                "handler sets a flag, and the trainer calls state_dict after prepare_batch"
            )

    def _feed(self, stream: BatchStream, count: int, arguments: RolloutArguments) -> None:
        """Let the trio side take prompts that were read: an interrupt here leaves them there.

        An error of theirs is the caller's: a ``prompt_id`` that has no text, for example.
        """

        def feed(executor: WorkflowExecutor) -> None:
            self._feeding = False
            if not executor.closed:
                executor.feed(stream, stream.feed.pop(count), arguments)

        self._feeding = True
        self._ask(feed)

    def batches(
        self,
        dataloader: DataLoader,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
        dynamic_batch_size: bool = False,
    ) -> Iterator[Batch]:
        """One epoch of ``prepare_batch``."""
        while True:
            try:
                batch = self.prepare_batch(
                    dataloader,
                    workflow,
                    workflow_kwargs,
                    should_accept_fn,
                    group_size,
                    group_policy,
                    dynamic_batch_size,
                )
            except StopIteration:
                return
            yield batch

    # --- the ledger --------------------------------------------------------------------------

    def ack(self, batch: Batch) -> None:
        """Say that a checkpoint holds what this batch taught. See ``WorkflowExecutor.ack``."""
        executor = self._live
        self._call(lambda: executor.ack(batch))

    def state_dict(self, batch: Batch | None = None) -> dict[str, Any]:
        """Return what a checkpoint has to hold. See ``WorkflowExecutor.state_dict``.

        The data loader is asked for its state in this thread; another thread that reads prompts is
        waited for.

        Raises:
            UsageError: Out of the data loader, too, or a signal handler that interrupts it.
        """
        executor = self._live
        self._call(executor.begin)
        with self._loader_lock:
            self._check_not_reading()
            place = self._ask(lambda executor: executor.recording.placing())()
        version = self.get_version()
        state = self._call(lambda: executor.recording.state_dict(version, batch))
        return {**state, **place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a checkpoint; before anything. See ``WorkflowExecutor.load_state_dict``."""
        self._ask(lambda executor: executor.load_state_dict(state))

    def ledger_statistics(self) -> LedgerStatistics:
        """The ledger's numbers at this moment: what was restored, and what is to be trimmed."""
        return self._ask(lambda executor: executor.recording.ledger.statistics())

    # --- version, pause, numbers -------------------------------------------------------------

    def get_version(self) -> int:
        """The weight version that every server in service has."""
        return self._live.get_version()

    def set_version(self, version: int) -> None:
        """Advance the version without loading anything. See ``WorkflowExecutor.set_version``."""
        executor = self._live
        self._call(lambda: executor.set_version(version))

    def recover(self, version: int, update: WeightUpdate | None = None) -> WeightUpdateResult:
        """Go on after a restart; before anything else. See ``WorkflowExecutor.recover``."""
        executor = self._live
        if update is None:
            return self._call(lambda: executor.recover(version))
        return self._carry(lambda here: executor.recover(version, here), update)

    def update_weights(self, update: WeightUpdate) -> WeightUpdateResult:
        """Bring new weights to every server. See ``WorkflowExecutor.update_weights``.

        The ``send`` of a distributed update is an ordinary function here, called in this thread.
        """
        return self._carry(self._live.update_weights, update)

    def _carry(
        self,
        function: Callable[[WeightUpdate], Awaitable[WeightUpdateResult]],
        update: WeightUpdate,
    ) -> WeightUpdateResult:
        """Call ``function`` with an update whose ``send``, if any, runs in this thread."""
        call, send = _Call[WeightUpdateResult](), update.send

        async def send_from_here(chunk: Chunk) -> object:
            assert send is not None
            return await call.in_callers_thread(lambda: send(chunk))

        if send is not None:
            update = replace(update, send=send_from_here)
        return self._answer_of(call, self._start_call, lambda: function(update))

    def init_weights_group(
        self, group: WeightsGroup, join: Callable[[], object] | None = None
    ) -> WeightsGroup:
        """Let every server join a process group of the trainer.

        See ``WorkflowExecutor.init_weights_group``. ``join`` is an ordinary function here, called
        in this thread.
        """
        executor = self._live

        async def join_from_here() -> object:
            assert join is not None
            return await call.in_callers_thread(join)

        on_trio_side = None if join is None else join_from_here
        call = _Call[WeightsGroup]()
        return self._answer_of(
            call, self._start_call, lambda: executor.init_weights_group(group, on_trio_side)
        )

    def offload(self, *, keep_weights: bool = True, drain: bool = False) -> dict[str, str]:
        """Put every server to sleep until ``onload``; rollouts wait. See ``Memory.offload``."""
        executor = self._live
        return self._call(lambda: executor.offload(keep_weights=keep_weights, drain=drain))

    def onload(self, tags: Sequence[str] | None = None) -> dict[str, str]:
        """Wake what sleeps, or a part of it. See ``Memory.onload``."""
        executor = self._live
        return self._call(lambda: executor.onload(tags))

    @contextmanager
    def offloaded(
        self, *, keep_weights: bool = True, drain: bool = False
    ) -> Iterator[dict[str, str]]:
        """Lend the servers' GPUs to the trainer for a ``with`` block. See ``Memory.offloaded``."""
        try:
            yield self.offload(keep_weights=keep_weights, drain=drain)
        finally:
            self.onload()

    def get_capacity(self) -> int:
        """How many groups admission would let start now."""
        return self._ask(lambda executor: executor.get_capacity())

    def pause(self) -> None:
        """Start no further training rollout; what runs goes on."""
        self._ask(lambda executor: executor.pause())

    def resume(self) -> None:
        """Start training rollouts again."""
        self._ask(lambda executor: executor.resume())

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing runs; ``pause`` first. See ``WorkflowExecutor.drain``."""
        executor = self._live
        self._call(lambda: executor.drain(timeout_s))

    # --- servers -----------------------------------------------------------------------------

    def add_server(self, address: str, cap: int | None = None) -> None:
        """Add a server while rollouts run. See ``WorkflowExecutor.add_server``."""
        self._ask(lambda executor: executor.add_server(address, cap))

    def remove_server(self, address: str) -> None:
        """Take a server out while rollouts run. See ``WorkflowExecutor.remove_server``."""
        self._ask(lambda executor: executor.remove_server(address))

    def set_server_cap(self, address: str, cap: int) -> None:
        """Change a server's cap while rollouts run. See ``WorkflowExecutor.set_server_cap``."""
        self._ask(lambda executor: executor.set_server_cap(address, cap))

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every server is ready. See ``WorkflowExecutor.wait_ready``."""
        executor = self._live
        self._call(lambda: executor.wait_ready(timeout_s))

    @contextmanager
    def paused(self, mode: PauseMode = "keep") -> Iterator[dict[str, str]]:
        """Stop generation on every server for the length of a block. See ``Pausing.paused``.

        However the block is left, by Ctrl-C too, the servers are resumed.

        Yields:
            The servers that could not be paused: address to what went wrong.
        """
        scope = self._live.engine.paused(mode)

        async def leave() -> None:
            await scope.__aexit__(None, None, None)

        # A pause that the caller did not stay for ends by itself.
        failed = self._call(scope.__aenter__, undo=lambda _: self._nursery.start_soon(leave))
        try:
            yield failed
        finally:
            self._call(leave)

    def health(self) -> dict[str, str | None]:
        """Ask every server whether it is alive: address to None, or to what is wrong."""
        executor = self._live
        return self._call(executor.engine.pool.health)

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """Every server's numbers at this moment."""
        return self._ask(lambda executor: executor.engine.statistics())

    def status(self) -> ExecutorStatus:
        """Why am I waiting: ``print(rollout.status())``. See ``WorkflowExecutor.status``."""
        return self._ask(lambda executor: executor.status())

    def rollout_counts(self) -> Mapping[str, int]:
        """Training groups by where they are: submitted, queued, running, and each outcome."""
        return self._ask(lambda executor: executor.counts.as_dict())

    @property
    def staleness_violations(self) -> int:
        """Groups delivered beyond ``max_staleness``; only ``straggler_policy="keep"`` has any."""
        return self._ask(lambda executor: executor.staleness_violations)


def _innermost(error: BaseException) -> BaseException:
    """The one exception in nurseries' groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
