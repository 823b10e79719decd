"""Workflows written for asyncio, as AReaL's are, on trio."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from .bridge import Bridge
from .errors import ConfigError, WorkflowError
from .lifetime import OncePerRun
from .rows import WorkflowResult
from .types import ModelRequest, ModelResponse

logger = logging.getLogger(__name__)

# What asyncio says where it finds no loop of its own, and trio where a coroutine yields a Future.
SIGNS = (
    "no running event loop",
    "There is no current event loop",
    "You're within a Trio environment",
    "trio.run received unrecognized yield message",
)


class AsyncioEngine:
    """The engine as asyncio code sees it.

    Args:
        engine: What really generates, on trio.
        bridge: To there.
    """

    def __init__(self, engine: Any, bridge: Bridge) -> None:
        self._engine = engine
        self._bridge = bridge

    async def agenerate(self, request: ModelRequest, /) -> ModelResponse:
        """Generate. Cancelling the asyncio task, or its rollout, aborts it on its server."""
        response: ModelResponse = await self._bridge.call(self._engine.agenerate, request)
        return response

    def get_version(self) -> int:
        """Return the version that a request sent now would be made by."""
        return int(self._engine.get_version())


class AsyncioWorkflow:
    """Runs a workflow that was written for asyncio, unchanged, as a rollout on trio.

    Its code runs in an asyncio loop inside the trio run (by ``trio-asyncio``); ``asyncio.gather``,
    ``sleep``, ``Queue``, ``wait_for`` and libraries for asyncio work as they do elsewhere. All such
    workflows of one run share one loop, so sessions and locks may be shared between rollouts. It
    opens at the first use and closes with the run.

    Cancellation passes both ways: a rollout that is cancelled, or too late, raises
    ``asyncio.CancelledError`` in the workflow; a generation whose asyncio task is cancelled is
    aborted on its server. Exceptions arrive as themselves. When the rollout ends, so do its
    generations and rewards, also those of tasks it forgot; what such a task does otherwise ends
    with the loop, and an exception of it is logged.

    Making one imports ``trio-asyncio``, and with it changes asyncio for the process: outside of
    trio, ``asyncio.run`` then uses a loop of that library too. A thread that wants asyncio's own
    says so: ``asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())``.

    Cost: 0.12 ms of the event loop's time for a rollout of one generation, beyond trio's own.

    Args:
        workflow: An object with an asyncio coroutine method ``arun_episode(engine, data)``.

    Raises:
        ConfigError: If it has none, or is a class; or ``trio-asyncio`` is not installed (it comes
            with ``arealtrio[asyncio]``).
    """

    def __init__(self, workflow: Any) -> None:
        if inspect.isclass(workflow):
            raise ConfigError(
                f"AsyncioWorkflow needs a workflow, not its class: {workflow.__qualname__}(…)"
            )
        if not inspect.iscoroutinefunction(getattr(workflow, "arun_episode", None)):
            raise ConfigError(
                "AsyncioWorkflow needs a workflow with a coroutine method arun_episode(engine, "
                f"data), and {type(workflow).__name__} has none"
            )
        _trio_asyncio()
        self.workflow = workflow

    async def arun_episode(self, engine: Any, data: Mapping[str, Any], /) -> WorkflowResult:
        """Run one rollout.

        Args:
            engine: Generates.
            data: One prompt's.

        Returns:
            What the workflow returned.

        Raises:
            Exception: What the workflow raised.
            WorkflowError: If its asyncio task was cancelled by itself.
        """
        loop = await _LOOP.get()
        run = self.workflow.arun_episode
        error: BaseException | None = None
        result: WorkflowResult = None
        async with trio.open_nursery() as nursery:
            bridge = Bridge(loop, nursery)
            try:
                result = await _in_asyncio(
                    loop, bridge.episode, run, AsyncioEngine(engine, bridge), data
                )
            except (Exception, *_ENDS_A_LOOP) as exc:  # noqa: BLE001 - raised below, in no group
                error = exc
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        return result


async def _in_asyncio(loop: Any, run: Callable[..., Awaitable[Any]], *args: object) -> Any:
    """Run an asyncio function as a task of the loop, and wait until it has ended.

    ``CancelledError`` is no Exception, and would go through the executor as a crash.
    """
    try:
        return await loop.run_aio_coroutine(run(*args))
    except (_Ending, BaseExceptionGroup) as exc:
        if (ending := _ending_in(exc)) is not None:
            raise ending.error from None
        raise
    except asyncio.CancelledError as exc:
        raise WorkflowError(
            "the workflow's asyncio task was cancelled, and not by its rollout: the workflow "
            "cancelled itself, or awaited a cancelled task"
        ) from exc


def explain_asyncio(error: Exception, workflow: object) -> Exception:
    """Return the error to record for one that a workflow raised.

    A workflow for asyncio that is handed in bare fails in ways that name neither it nor the cure.

    Args:
        error: As raised.
        workflow: What raised it.

    Returns:
        A WorkflowError that says what to do, caused by ``error``, where it is of that kind; else
        the error itself.
    """
    if isinstance(workflow, AsyncioWorkflow) or not _misses_asyncio(error):
        return error
    explained = WorkflowError(
        f"{type(workflow).__qualname__} uses asyncio, and rollouts run on trio: wrap it, "
        "AsyncioWorkflow(workflow)"
    )
    explained.__cause__ = error
    return explained


def _misses_asyncio(error: Exception) -> bool:
    if not isinstance(error, RuntimeError | TypeError | AttributeError):
        return False
    words = _words_of(error)
    return any(sign in words for sign in SIGNS) or _raised_in_asyncio(error)


def _words_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - user code as well, and an error that can not be told is one
        return ""


def _raised_in_asyncio(error: Exception) -> bool:
    """Whether asyncio itself raised it; some of it takes the missing loop for None, and goes on."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__")).startswith("asyncio.")


def _trio_asyncio() -> Any:
    try:
        import trio_asyncio  # here, because to import it changes asyncio for the process
    except ImportError as exc:
        raise ConfigError(
            "AsyncioWorkflow needs trio-asyncio: pip install 'arealtrio[asyncio]'"
        ) from exc
    return trio_asyncio


@asynccontextmanager
async def _open_loop() -> AsyncIterator[Any]:
    async with _trio_asyncio().open_loop() as loop:
        # By default the loop would crash of what nobody awaits, and the entire run with it.
        loop.set_exception_handler(_log)
        loop.set_task_factory(_guarded_task)
        yield loop


_ENDS_A_LOOP = (SystemExit, KeyboardInterrupt)


class _Ending(Exception):
    """Carries an error that asyncio would let end its loop to the rollout that raised it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"a task raised {type(error).__name__}")
        self.error = error


def _ending_in(error: BaseException) -> _Ending | None:
    """The first in an error, or in the groups that ``asyncio.TaskGroup`` makes of its tasks'."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_ending_in, error.exceptions)), None)
    return error if isinstance(error, _Ending) else None


def _guarded_task(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Make a task that can not end the loop: all workflows of a run share it, and would hang."""
    guarded = _Guarded(coroutine) if asyncio.iscoroutine(coroutine) else coroutine
    return asyncio.Task(guarded, loop=loop, **options)


class _Guarded(Coroutine[Any, Any, Any]):
    """A coroutine whose errors end no loop.

    What is thrown into it goes into the other at once: a coroutine around that, cancelled before it
    began, would leave it without ever awaiting it, and Python would complain.

    Args:
        coroutine: The other.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine

    def send(self, value: Any, /) -> Any:
        """Go on with it."""
        try:
            return self._coroutine.send(value)
        except _ENDS_A_LOOP as exc:
            raise _Ending(exc) from exc

    def throw(self, *error: Any) -> Any:
        """Let it raise where it waits."""
        try:
            return self._coroutine.throw(*error)
        except _ENDS_A_LOOP as exc:
            raise _Ending(exc) from exc

    def close(self) -> None:
        """End it."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        """Run it for whoever awaits it, which a task does not."""
        return self._coroutine.__await__()


def _log(_: Any, context: Mapping[str, Any]) -> None:
    logger.error(
        "in an asyncio workflow: %s", context.get("message"), exc_info=context.get("exception")
    )


_LOOP: OncePerRun[Any] = OncePerRun("asyncio loop of the workflows", _open_loop)
