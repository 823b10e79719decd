"""A trio whose runs can be repeated: one seed, one order of tasks, no waiting."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import trio
from trio.testing import MockClock

from ..errors import UsageError
from .amounts import positive

T = TypeVar("T")

TIME_LIMIT_S: Final = 100_000.0
_YOUNG: Final = 50_000  # objects: some 10 MiB at most
_HOOKS: Final = ("_ALLOW_DETERMINISTIC_SCHEDULING", "_r")


@contextmanager
def repeatable_schedule(seed: int = 0) -> Iterator[random.Random]:
    """Let every ``trio.run`` that begins in the block take its tasks in an order the seed gives.

    trio shuffles the tasks that are ready, so that no program relies on their order. This keeps the
    shuffle and makes it repeatable, by trio's own hooks for tests, which are private to it.

    Args:
        seed: Of the order; another one is another schedule.

    Raises:
        UsageError: This version of trio has other hooks.
    """
    run: Any = trio._core._run
    if not all(hasattr(run, hook) for hook in _HOOKS):
        raise UsageError(f"the schedule of trio {trio.__version__} can not be repeated")
    before = [getattr(run, hook) for hook in _HOOKS]
    schedule = random.Random(seed)
    _set(run, (True, schedule))
    try:
        yield schedule
    finally:
        _set(run, before)


def _set(run: Any, values: Any) -> None:
    for hook, value in zip(_HOOKS, values, strict=True):
        setattr(run, hook, value)


def run_virtually(
    function: Callable[..., Awaitable[T]],
    *args: object,
    seed: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
) -> T:
    """Run an async function on a clock that jumps to whatever happens next, and return its result.

    Hours pass in milliseconds, and the same seed gives the same run, as long as the function starts
    no thread and asks no other source of time or chance.

    Args:
        function: What to run.
        args: Its arguments.
        seed: Of the schedule. Give the fleet the same.
        time_limit_s: Virtual seconds after which it is taken for a deadlock, above 0; ``inf`` is
            no limit.

    Raises:
        ConfigError: ``time_limit_s`` is no such number.
        trio.TooSlowError: It did not end within ``time_limit_s``.
        Exception: What the function raises, with a note that says how to repeat the run.
    """
    if time_limit_s != math.inf:
        positive("time_limit_s", time_limit_s)

    async def main() -> T:
        with trio.fail_after(time_limit_s):
            return await function(*args)

    try:
        with repeatable_schedule(seed), _rare_collections():
            return trio.run(main, clock=MockClock(autojump_threshold=0))
    except BaseException as exc:
        name = getattr(function, "__qualname__", repr(function))
        exc.add_note(f"seed={seed}; repeat with run_virtually({name}, …, seed={seed})")
        raise


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for cycles less often: else a seventh of the time goes there.

    Thousands of rollouts in flight are objects made and dropped by the million, with hardly a cycle
    among them. Whoever asked for fewer collections than this keeps his own setting.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _YOUNG:
        gc.set_threshold(_YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
