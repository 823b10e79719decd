"""Name the user code that blocks the event loop: while it runs, no other rollout does."""

from __future__ import annotations

import gc
import logging
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

import trio

Await: TypeAlias = tuple[FrameType, int]  # a suspended frame, and the line it waits in

LOOK_CLOSELY_S = 10.0  # after a slow pass
USAGE_OF_THREAD: Final[int | None] = getattr(resource, "RUSAGE_THREAD", None)  # Linux has it
LIBRARIES = (os.path.dirname(__file__), os.path.dirname(trio.__file__))

logger = logging.getLogger(__name__)


@contextmanager
def watch_slow_steps(nursery: trio.Nursery, limit_s: float | None) -> Iterator[StepWatch | None]:
    """Warn of rollouts that keep the loop for longer than a limit between two awaits.

    The warning names the rollout and the function, once for each place in the code. The clock is
    read at each pass of the loop over all tasks that can run, and where the caller says that a step
    began or ended. A step that is too long leaves at least as long a time between two readings, and
    a pass of a thousand short ones does not. Only for some seconds after such a time is each step
    timed by itself. So what blocks once is not named, and what blocks again is.

    A step is to blame if it computed for longer than the limit, or waited in a call that does not
    return to the loop. One that was merely kept from running, because other programs had the CPU,
    is not; nor is the one in which Python's collector happened to walk all that is alive.

    Args:
        nursery: Its children are the rollouts; each task's name is the rollout's.
        limit_s: Of one step. What else waits for as long: the answers of all other servers. None:
            nobody is warned, and nothing is timed.

    Yields:
        What is to be told where steps begin and end; None where nothing is timed.
    """
    if limit_s is None:
        yield None
        return
    watch = StepWatch(_Steps(nursery, limit_s), limit_s)
    trio.lowlevel.add_instrument(watch)
    try:
        yield watch
    finally:
        watch.stop()
        trio.lowlevel.remove_instrument(watch)


class StepWatch(trio.abc.Instrument):
    """Times what lies between two readings of the clock, and looks closer where it was long."""

    def __init__(self, steps: _Steps, limit_s: float) -> None:
        self._steps = steps
        self._limit_s = limit_s
        self._outsider: trio.lowlevel.Task | None = None  # the last that called, and is no rollout
        self._last = time.perf_counter()  # when the clock was read
        self._was_long = False  # some time of this pass
        self._looking_until: float | None = None

    def after_io_wait(self, timeout: float) -> None:
        """A pass begins."""
        del timeout
        self._last = time.perf_counter()
        self._was_long = False

    def called(self) -> None:
        """Some task asks for rollouts; if it is none itself, it may take its time over many."""
        task = trio.lowlevel.current_task()
        if task is not self._outsider:
            if self._steps.rollout_of(task) is not None:
                return
            self._outsider = task
        self.between_steps()

    def between_steps(self) -> None:
        """Call this as a rollout's first step begins, and as its last one ends."""
        now = time.perf_counter()
        if now - self._last > self._limit_s:
            self._was_long = True
        self._last = now

    def before_io_wait(self, timeout: float) -> None:
        """A pass has ended."""
        del timeout
        self.between_steps()
        if self._was_long:
            self._look_closely(self._last + LOOK_CLOSELY_S)
        elif self._looking_until is not None and self._last > self._looking_until:
            self.stop()

    def _look_closely(self, until: float) -> None:
        if self._looking_until is None:
            gc.callbacks.append(self._steps.collecting)
            trio.lowlevel.add_instrument(self._steps)
        self._looking_until = until

    def stop(self) -> None:
        """End the closer look, if there is one."""
        if self._looking_until is not None:
            self._looking_until = None
            trio.lowlevel.remove_instrument(self._steps)
            gc.callbacks.remove(self._steps.collecting)


class _Steps(trio.abc.Instrument):
    """Times each step of each task, and warns of slow ones of rollouts."""

    def __init__(self, nursery: trio.Nursery, limit_s: float) -> None:
        self._nursery = nursery
        self._limit_s = limit_s
        self._awaits: list[Await] = []
        self._began = self._cpu = float("inf")  # the first step it sees the end of began unseen
        self._sleeps = 0
        self._collected_s = self._collection_began = 0.0
        self._warned: set[str] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._awaits = list(task.iter_await_frames())
        self._collected_s = 0.0
        self._sleeps = _sleeps()
        self._cpu = time.thread_time()
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took_s = time.perf_counter() - self._began - self._collected_s
        if took_s <= self._limit_s:
            return
        cpu_s = max(0.0, time.thread_time() - self._cpu - self._collected_s)
        slept = USAGE_OF_THREAD is None or _sleeps() > self._sleeps
        if slept or cpu_s > self._limit_s:
            self._warn(task, took_s, cpu_s)

    def collecting(self, phase: str, info: dict[str, int]) -> None:
        """What ``gc.callbacks`` calls before and after a collection, of whatever thread."""
        del info
        now = time.perf_counter()
        if phase == "start":
            self._collection_began = now
        else:
            self._collected_s += now - self._collection_began

    def _warn(self, task: trio.lowlevel.Task, took_s: float, cpu_s: float) -> None:
        rollout = self.rollout_of(task)
        place = _place(self._awaits, "after") or _place(list(task.iter_await_frames()), "before")
        if rollout is None or place is None or place in self._warned:
            return
        self._warned.add(place)
        logger.warning(
            "rollout %s kept the event loop busy for %.0f ms (%.0f ms of CPU) %s: no other rollout "
            "ran meanwhile. Put what computes into a ProcessReward or trio.to_thread.run_sync. "
            "(With little CPU it slept, or another thread of the process held the interpreter.) "
            "slow_step_warning_s is %g; a place is told once",
            rollout.name,
            1000 * took_s,
            1000 * cpu_s,
            place,
            self._limit_s,
        )

    def rollout_of(self, task: trio.lowlevel.Task) -> trio.lowlevel.Task | None:
        """The child of the nursery that a task is, or descends from."""
        while (parent := task.parent_nursery) is not None:
            if parent is self._nursery:
                return task
            task = parent.parent_task
        return None


def _sleeps() -> int:
    """How often this thread gave the CPU away to wait; being taken off it does not count.

    0 where the system does not tell.
    """
    return 0 if USAGE_OF_THREAD is None else resource.getrusage(USAGE_OF_THREAD).ru_nvcsw


def _place(awaits: list[Await], when: str) -> str | None:
    """Say where a step began or ended, in the innermost code that is the user's.

    A workflow of ours runs the user's reward function, so that is named with it.
    """
    users = [(f, line) for f, line in awaits if not _is_of_a_library(f)]
    if users:
        frame, line = users[-1]
        code = frame.f_code
        return f"{when} the await in {code.co_qualname} ({Path(code.co_filename).name}:{line})"
    for frame, _ in awaits:
        function = getattr(frame.f_locals.get("self"), "reward_fn", None)
        if function is not None:
            name = getattr(function, "__qualname__", type(function).__qualname__)
            return f"in {frame.f_code.co_qualname}, whose reward_fn is {name}"
    return None


def _is_of_a_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(LIBRARIES)
