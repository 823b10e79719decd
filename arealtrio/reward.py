"""Reward functions in processes of their own, which can be killed.

Three ways to give a workflow its ``reward_fn``:

- a plain function: it runs in the event loop, and while it runs nothing else does. For what takes
  well under a millisecond, such as comparing two strings.
- an ``async`` function: for what waits, such as a judge model behind HTTP.
- ``ProcessReward(function, pool)``: for what computes, can hang, or can crash.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import pickle
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import trio
import trio_parallel

from . import reward_worker
from .bridge import in_trio
from .checks import finite, integer
from .errors import (
    ConfigError,
    RewardCrashed,
    RewardError,
    RewardRaised,
    RewardTimedOut,
    RolloutClosed,
)
from .lifetime import OncePerRun

logger = logging.getLogger(__name__)

LEAVE_S = 2.0  # for an idle worker to end by itself when its pool closes; then it is killed


@dataclass(frozen=True, slots=True)
class RewardOutcome:
    """What became of one call of a reward function.

    Args:
        value: The reward; None where the function returned None, which rejects the rollout.
        error: Why there is none: RewardTimedOut, RewardRaised, RewardCrashed, or RewardError itself
            for a value that is no finite number.
    """

    value: float | None = None
    error: RewardError | None = None

    def unwrap(self) -> float | None:
        """Return the value.

        Raises:
            RewardError: If there is none.
        """
        if self.error is not None:
            raise self.error
        return self.value


class RewardPool:
    """Processes that run reward functions: ``max_workers`` at once, first come, first served.

    A function that takes too long, or whose rollout is cancelled, is killed with its process, so a
    hung one holds nothing; one that crashes takes only its own process with it. The next call gets
    a new process. Nothing is called twice: a function that raised would raise again.

    A pool belongs to the trio run that uses it. ``async with pool:`` waits until its processes are
    ready, and leaves none behind; without it, the first use starts them, and the end of the run
    (closing the ``RolloutController``) ends them. Should this process be killed, the kernel ends
    them on Linux, even where they hang. What stays is the resource tracker that Python's
    ``multiprocessing`` starts once for each interpreter. A process that a reward function starts by
    itself is its own to end.

    Processes are spawned, not forked: a fork of a process with threads and a CUDA context is
    undefined. So a script needs the usual ``if __name__ == "__main__":`` around what it runs.

    Cost, on a slow core: 0.15 ms of the event loop's time for a call, 0.6 ms with 400 kB of texts
    and token ids, and half a second for a process to start. For less work than that, call the
    function inline.

    Args:
        max_workers: Processes. None: half the cores this process may use, at least 1; the other
            half is for the trainer and the event loop.
        timeout_s: Of one call, from when a process takes it; neither waiting for one nor starting
            one counts. Choose it above what the slowest honest answer needs.
        warm: Whether to start all processes at once, and with them every import of the reward
            functions known by then. Otherwise each starts when the first call needs it.
        initializer: Called once in each process before its first reward; picklable.
        start_timeout_s: For a process to start, imports and initializer included.

    Raises:
        ConfigError: For a limit out of its range, or an initializer that can not be pickled.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        timeout_s: float = 15.0,
        *,
        warm: bool = True,
        initializer: Callable[[], object] | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self.max_workers = _workers(max_workers)
        self.timeout_s = _positive("timeout_s", timeout_s)
        self.start_timeout_s = _positive("start_timeout_s", start_timeout_s)
        self.warm = warm
        self._initializer = initializer
        self._functions: dict[bytes, Callable[..., object]] = {}  # by its pickle: some have no hash
        self._preparation()
        self._workers = OncePerRun("reward pool", self._open)

    async def __aenter__(self) -> Self:
        """Start it; return when it is warm."""
        try:
            await (await self._workers.get()).warmed.wait()
        except BaseException:
            await self._workers.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill what runs, end every process, and wait until they are gone."""
        await self._workers.aclose()

    def register(self, function: Callable[..., object]) -> None:
        """Let processes that start from now on import a function before they need it.

        Raises:
            ConfigError: If it can not be pickled.
        """
        self._functions[_pickled(function)] = function

    def start(self) -> None:
        """Begin to start the processes, and return at once; harmless if they are there."""
        self._workers.start()

    async def outcome(
        self, function: Callable[..., object], /, *args: object, **kwargs: object
    ) -> RewardOutcome:
        """Call a function in a process, and say what became of it.

        Cancellation kills the process, and returns when it is dead.

        Args:
            function: A function of a module, or a picklable callable.
            args: Picklable.
            kwargs: Picklable.

        Raises:
            RolloutClosed: If the pool was closed meanwhile.
        """
        return await self.outcome_within(self.timeout_s, function, args, kwargs)

    async def run(
        self, function: Callable[..., object], /, *args: object, **kwargs: object
    ) -> float | None:
        """As ``outcome``, but return the reward, or raise why there is none.

        Raises:
            RewardError: Of the kind that ``RewardOutcome`` lists.
            RolloutClosed: If the pool was closed meanwhile.
        """
        return (await self.outcome_within(self.timeout_s, function, args, kwargs)).unwrap()

    async def outcome_within(
        self,
        timeout_s: float,
        function: Callable[..., object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> RewardOutcome:
        """As ``outcome``, with a time limit of its own."""
        name = name_of(function)
        try:
            job = pickle.dumps((function, args, dict(kwargs)), pickle.HIGHEST_PROTOCOL)
        except Exception as exc:  # noqa: BLE001 - pickle raises what the objects' own code raises
            error = RewardError(f"{name}: its arguments can not be pickled: {type(exc).__name__}")
            error.__cause__ = exc
            return RewardOutcome(error=error)
        workers = await self._workers.get()
        return await workers.outcome(name, job, timeout_s)

    def _preparation(self) -> bytes:
        try:
            return pickle.dumps((list(self._functions.values()), self._initializer))
        except Exception as exc:
            raise ConfigError(
                f"the initializer can not be pickled ({exc}): give a function of a module"
            ) from exc

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[_Workers]:
        try:
            async with trio_parallel.open_worker_context(
                idle_timeout=math.inf, grace_period=LEAVE_S
            ) as context:
                workers = _Workers(
                    context, self.max_workers, self._preparation, self.start_timeout_s
                )
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(workers.warm_up, self.warm)
                    try:
                        yield workers
                    finally:
                        workers.kill()
                        nursery.cancel_scope.cancel()
        except trio_parallel.BrokenWorkerError as exc:
            logger.warning("a reward process did not end by itself when its pool closed: %s", exc)


class _Workers:
    """A pool's processes in one trio run.

    Args:
        context: Starts, keeps and kills them.
        count: At most.
        preparation: Returns what a new one is prepared with.
        start_timeout_s: For that.
    """

    def __init__(
        self,
        context: trio_parallel.WorkerContext,
        count: int,
        preparation: Callable[[], bytes],
        start_timeout_s: float,
    ) -> None:
        self.warmed = trio.Event()
        self._context = context
        self._preparation = preparation
        self._start_timeout_s = start_timeout_s
        self._free = trio.CapacityLimiter(count)  # grants in the order asked
        self._calls: set[trio.CancelScope] = set()
        self._closed = False

    async def warm_up(self, everything: bool) -> None:
        """Start every process, if it is to be now; what fails then is told by the first reward."""
        async with trio.open_nursery() as nursery:
            for _ in range(int(self._free.total_tokens) if everything else 0):
                nursery.start_soon(self._warm_one)
        self.warmed.set()

    async def _warm_one(self) -> None:
        async with self._free:
            try:
                await self._start_process()
            except RewardError as exc:
                logger.warning("%s", exc)

    def kill(self) -> None:
        """Kill every process that is busy; its call ends with RolloutClosed."""
        self._closed = True
        for scope in self._calls:
            scope.cancel()

    async def outcome(self, name: str, job: bytes, timeout_s: float) -> RewardOutcome:
        """Run a job in the next free process."""
        with trio.CancelScope() as scope:
            if self._closed:
                scope.cancel()
            self._calls.add(scope)
            try:
                async with self._free:
                    return await self._evaluate(name, job, timeout_s)
            except RewardError as exc:
                return RewardOutcome(error=exc)
            finally:
                self._calls.discard(scope)
        raise RolloutClosed(f"the reward pool was closed before {name} had returned")

    async def _evaluate(self, name: str, job: bytes, timeout_s: float) -> RewardOutcome:
        if not self._context.statistics().idle_workers:
            await self._start_process()
        # No checkpoint since: the idle process is still there, and a start can not eat the time.
        with trio.move_on_after(timeout_s):
            try:
                return _read(name, await self._run(reward_worker.evaluate, job))
            except trio_parallel.BrokenWorkerError as exc:
                raise _crashed(name, exc) from None
        raise RewardTimedOut(f"{name} took longer than timeout_s={timeout_s:g} and was killed")

    async def _start_process(self) -> None:
        """Start one more process and leave it idle.

        Raises:
            RewardError: If it can not be started, or its initializer failed.
        """
        with trio.move_on_after(self._start_timeout_s):
            try:
                failed = await self._run(reward_worker.prepare, self._preparation())
            except trio_parallel.BrokenWorkerError as exc:
                raise RewardCrashed(
                    f"a reward process {_ending(exc)} while it started; a script needs "
                    'if __name__ == "__main__": around what it runs',
                    _exitcode(exc),
                ) from None
            if failed is None:
                return
            _, kind, text = failed
            raise RewardRaised(f"a reward process could not be prepared: {kind}", text)
        raise RewardError(
            f"no reward process was ready within start_timeout_s={self._start_timeout_s:g}"
        )

    async def _run(self, function: Callable[[bytes], Any], job: bytes) -> Any:
        return await self._context.run_sync(
            function,
            job,
            kill_on_cancel=True,
            limiter=nullcontext(),  # ours is held already
        )


def _read(name: str, report: reward_worker.Report) -> RewardOutcome:
    match report:
        case ("value", value):
            return RewardOutcome(value)
        case ("wrong", reason):
            return RewardOutcome(error=RewardError(f"{name}: {reason}"))
        case (_, kind, text):
            return RewardOutcome(error=RewardRaised(f"{name} raised {kind}", text))


def _crashed(name: str, exc: trio_parallel.BrokenWorkerError) -> RewardCrashed:
    return RewardCrashed(f"the process that ran {name} {_ending(exc)}", _exitcode(exc))


def _exitcode(exc: trio_parallel.BrokenWorkerError) -> int | None:
    code = getattr(exc.args[-1], "exitcode", None)  # documented: the last argument is the process
    return code if isinstance(code, int) else None


def _ending(exc: trio_parallel.BrokenWorkerError) -> str:
    code = _exitcode(exc)
    if code is None:
        return "died"
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was ended by signal {-code}"


class ProcessReward:
    """A reward function that runs in a pool's processes; give it to a workflow as ``reward_fn``.

    A call returns the reward, or raises why there is none, which fails its rollout (as a
    ``FailureKind.WORKFLOW``) and trains nobody on a 0 that nothing earned. Whoever wants a time-out
    to count as a wrong answer says so::

        graded = ProcessReward(math_reward, pool)

        async def reward_fn(*args, **data):
            outcome = await graded.outcome(*args, **data)
            return 0.0 if isinstance(outcome.error, RewardTimedOut) else outcome.unwrap()

    Args:
        function: A function of a module (no lambda, no function inside another), or a picklable
            callable; not async.
        pool: Where it runs. Several functions may share one.
        timeout_s: Of each call; None takes the pool's.

    Raises:
        ConfigError: If the function is none of these.
    """

    def __init__(
        self, function: Callable[..., object], pool: RewardPool, *, timeout_s: float | None = None
    ) -> None:
        pool.register(function)
        self.function = function
        self._pool = pool
        self._timeout_s = None if timeout_s is None else _positive("timeout_s", timeout_s)

    def warm_up(self) -> None:
        """Begin to start the pool; a workflow does so before it generates, to do both at once."""
        self._pool.start()

    async def __call__(self, /, *args: object, **kwargs: object) -> float | None:
        """Return the reward, or raise RewardError or RolloutClosed; see ``RewardPool.run``."""
        return (await self.outcome(*args, **kwargs)).unwrap()

    async def outcome(self, /, *args: object, **kwargs: object) -> RewardOutcome:
        """Say what became of a call; see ``RewardPool.outcome``."""
        limit_s = self._pool.timeout_s if self._timeout_s is None else self._timeout_s
        return await in_trio(self._pool.outcome_within, limit_s, self.function, args, kwargs)


_areal_pools: dict[int, RewardPool] = {}


class AsyncRewardWrapper(ProcessReward):
    """AReaL's wrapper of a synchronous reward function, by AReaL's name and with its call.

    It may be awaited in a trio workflow, and in an asyncio one that runs in ``AsyncioWorkflow``.
    Wrappers with the same ``max_workers`` share one pool, as AReaL's do. Different from AReaL:

    - A time-out raises RewardTimedOut. AReaL returns 0, and trains on it.
    - A time-out kills the process. AReaL's goes on, and a pool of two is soon used up.
    - Nothing is tried again: what raises would raise again, what hangs would hang again.

    Args:
        reward_fn: As for ``ProcessReward``.
        timeout_seconds: Of one call, from when a process takes it.
        max_workers: Processes; None as for ``RewardPool``.
        max_retries: Only 0.

    Raises:
        ConfigError: For another ``max_retries``, or as ``ProcessReward``.
    """

    def __init__(
        self,
        reward_fn: Callable[..., object],
        timeout_seconds: float = 15,
        max_workers: int | None = None,
        max_retries: int = 0,
    ) -> None:
        if max_retries != 0:
            raise ConfigError(
                "max_retries must be 0: a reward that fails or hangs once does so again"
            )
        count = _workers(max_workers)
        pool = _areal_pools.get(count) or RewardPool(count)
        super().__init__(reward_fn, pool, timeout_s=timeout_seconds)
        _areal_pools[count] = pool


def name_of(function: Callable[..., object]) -> str:
    """Name a function for a message."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _pickled(function: Callable[..., object]) -> bytes:
    if not callable(function):
        raise ConfigError(f"a reward function must be callable, not a {type(function).__name__}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{name_of(function)} is async: give it to the workflow as it is")
    try:
        return pickle.dumps(function)
    except Exception as exc:
        raise ConfigError(
            f"{name_of(function)} can not be pickled ({exc}): give a function of a module, not a "
            "lambda or one inside another"
        ) from exc


def _workers(count: int | None) -> int:
    return _half_the_cores() if count is None else integer("max_workers", count, 1)


def _half_the_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // 2)


def _positive(name: str, seconds: float) -> float:
    value = finite(name, seconds)
    if value <= 0:
        raise ConfigError(f"{name} must be finite and above 0, not {value!r}")
    return value
