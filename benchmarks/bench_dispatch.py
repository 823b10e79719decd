"""What does it cost to get a rollout under way, to hear of its end, and to have it wait?

A trivial rollout is one whose workflow awaits one checkpoint, as anything that waits does, and
returns a row; its baseline is the same coroutine in a bare ``nursery.start_soon``. Latencies are
read with 1,024 rollouts waiting for real HTTP answers, beside a bare portal round trip
(``run_sync_soon`` and a queue). Targets: at most 5, and 3.

    pytest benchmarks/bench_dispatch.py -s        # half a minute
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import trio

from arealtrio import ModelRequest, RolloutConfig, RolloutController, Trajectory
from arealtrio.controller import RolloutController as Controller
from arealtrio.executor import open_executor
from arealtrio.testing import simulated_executor
from arealtrio.transport import ensure_descriptors

from .inference_server import inference_server

ROLLOUTS = 2000
BURSTS = 20  # in one reading, so that each has its share of the collector's full passes
PROBES = 300
REST_S = 0.0003  # until both threads wait again
ROW = Trajectory(
    input_ids=np.arange(8, dtype=np.int32),
    loss_mask=np.ones(8, dtype=np.int32),
    logprobs=np.zeros(8, dtype=np.float32),
    versions=np.zeros(8, dtype=np.int32),
    reward=1.0,
)
PROMPT = np.arange(3, dtype=np.int32)


class Trivial:
    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> Trajectory:  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        return ROW


class Generates:
    """Asks a server, and waits as long as it takes."""

    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> None:  # noqa: ARG002
        await engine.agenerate(ModelRequest(PROMPT))


class Tells:
    """Says when it started."""

    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> Trajectory:  # noqa: ARG002
        data["started"].put(time.perf_counter_ns())
        return ROW


class Rests:
    """Ends while its caller waits, and remembers when."""

    ended = 0

    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> Trajectory:  # noqa: ARG002
        await trio.sleep(0.001)
        self.ended = time.perf_counter_ns()
        return ROW


# --- a trivial rollout ---------------------------------------------------------------------------


async def through_the_executor(workflow: Trivial) -> float:
    """Seconds per rollout, from submit to its result."""
    async with simulated_executor(
        servers=1, consumer_batch_size=2 * ROLLOUTS, max_concurrent_rollouts=2 * ROLLOUTS
    ) as (executor, _):
        start = time.perf_counter()
        for _ in range(ROLLOUTS):
            executor.submit({}, workflow)
        results = await executor.wait(ROLLOUTS)
        seconds = time.perf_counter() - start
    assert all(result.group is not None for result in results)
    return seconds / ROLLOUTS


async def bare(workflow: Trivial) -> float:
    async with trio.open_nursery() as nursery:
        start = time.perf_counter()
        for _ in range(ROLLOUTS):
            nursery.start_soon(workflow.arun_episode, None, {})
    return (time.perf_counter() - start) / ROLLOUTS


async def reading(burst: Callable[[Trivial], Awaitable[float]]) -> float:
    """The mean of some bursts, with their share of the collector's work."""
    gc.collect()
    return statistics.mean([await burst(Trivial()) for _ in range(BURSTS)])


def trivial_rollout(rounds: int = 5) -> tuple[float, float]:
    """Median seconds of a trivial rollout, ours and bare, taken in turn.

    Python's collector is on, as in production. Some bursts meet a full pass, which costs as much
    as a third of them, so a median of single bursts would be one or the other by chance. A reading
    is the mean of several in a row, and begins with nothing for the collector to do, so that no
    side walks what the other left.
    """

    async def main() -> tuple[float, float]:
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(await reading(through_the_executor))
            theirs.append(await reading(bare))
        return statistics.median(ours), statistics.median(theirs)

    return trio.run(main)


def trivial_rollout_alone() -> tuple[float, float]:
    """The same in a process of its own, whose collector walks nothing that others left alive."""
    code = "from benchmarks import bench_dispatch as b; print(*b.trivial_rollout())"
    ours, theirs = map(float, in_own_process(code).split())
    return ours, theirs


def in_own_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


# --- latency, and idleness -----------------------------------------------------------------------


@contextmanager
def waiting_rollouts(count: int) -> Iterator[Controller]:
    """A controller with so many rollouts that wait for a real server's answer."""
    ensure_descriptors(2 * count + 1000)
    with inference_server() as url:
        config = RolloutConfig(
            servers=[url],
            consumer_batch_size=count + 10 * PROBES,
            max_concurrent_rollouts=count + 64,
            max_requests_per_server=count + 64,
            straggler_policy="keep",  # results must not wait for those that never end
        )
        with RolloutController(config) as controller:
            for _ in range(count):
                controller.submit({}, Generates())
            while controller.statistics()[0].outstanding < count:
                time.sleep(0.05)  # the other side is a real process
            time.sleep(0.5)
            yield controller


def percentiles(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Seconds, by name."""
    cuts = statistics.quantiles(nanoseconds, n=100)
    return {name: cuts[n - 1] * 1e-9 for name, n in (("p50", 50), ("p90", 90), ("p99", 99))}


def round_trip(token: trio.lowlevel.TrioToken) -> int:
    answer: SimpleQueue[None] = SimpleQueue()
    start = time.perf_counter_ns()
    token.run_sync_soon(answer.put, None)
    answer.get()
    return time.perf_counter_ns() - start


def submit_to_start(controller: Controller) -> int:
    started: SimpleQueue[int] = SimpleQueue()
    start = time.perf_counter_ns()
    controller.submit({"started": started}, Tells())
    taken = started.get() - start
    controller.wait(1)
    return taken


def end_to_wait(controller: Controller) -> int:
    workflow = Rests()
    controller.submit({}, workflow)
    controller.wait(1)
    return time.perf_counter_ns() - workflow.ended


def latencies(in_flight: int = 1024) -> dict[str, dict[str, float]]:
    """Percentiles in seconds of ``portal``, ``start`` and ``end``, taken in turn."""
    with waiting_rollouts(in_flight) as controller:
        token = SimpleQueue[trio.lowlevel.TrioToken]()
        workflow = _Token(token)
        controller.submit({}, workflow)
        controller.wait(1)
        portal = token.get()
        probes: dict[str, Callable[[], int]] = {
            "portal": lambda: round_trip(portal),
            "start": lambda: submit_to_start(controller),
            "end": lambda: end_to_wait(controller),
        }
        taken: dict[str, list[int]] = {name: [] for name in probes}
        for _ in range(PROBES):
            for name, probe in probes.items():
                taken[name].append(probe())
                time.sleep(REST_S)
    return {name: percentiles(times) for name, times in taken.items()}


class _Token:
    """Hands out the token of the run it runs in."""

    def __init__(self, to: SimpleQueue[trio.lowlevel.TrioToken]) -> None:
        self._to = to

    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> Trajectory:  # noqa: ARG002
        self._to.put(trio.lowlevel.current_trio_token())
        return ROW


def idle_cpu(waiting: int = 4096, seconds: float = 10.0) -> float:
    """CPU time ÷ time while so many rollouts wait for their servers."""
    with waiting_rollouts(waiting):
        start, cpu = time.monotonic(), time.process_time()
        time.sleep(seconds)
        return (time.process_time() - cpu) / (time.monotonic() - start)


# --- memory --------------------------------------------------------------------------------------


async def memory_of_waiting(url: str, count: int, cap: int) -> float:
    """RSS per rollout, in bytes, of ``count`` rollouts on a server that takes ``cap`` requests."""
    config = RolloutConfig(
        servers=[url],
        consumer_batch_size=count,
        max_concurrent_rollouts=count,
        max_requests_per_server=cap,
    )
    async with open_executor(config) as executor:
        gc.collect()
        before = psutil.Process().memory_info().rss
        workflow = Generates()
        for _ in range(count):
            executor.submit({}, workflow)
        await until(lambda: executor.engine.statistics()[0].requests >= min(cap, count))
        await trio.sleep(1)
        after: int = psutil.Process().memory_info().rss
    return (after - before) / count


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the other side is a real process
        await trio.sleep(0.05)


def memory(count: int, cap: int) -> float:
    """The same, in a process of its own: memory freed by others would hide what is taken."""
    code = (
        "import trio; from benchmarks import bench_dispatch as b; "
        "from benchmarks.inference_server import inference_server\n"
        f"b.ensure_descriptors({min(count, cap)} + 1000)\n"
        f"with inference_server() as u: print(trio.run(b.memory_of_waiting, u, {count}, {cap}))"
    )
    return float(in_own_process(code))


# --- targets -------------------------------------------------------------------------------------


def test_a_trivial_rollout_stays_near_a_bare_task() -> None:
    ours, theirs = trivial_rollout_alone()
    print(f"\ntrivial rollout: {ours * 1e6:.1f} us, {ours / theirs:.2f} of a bare task")
    assert ours / theirs <= 5


def test_nothing_is_late() -> None:
    taken = latencies()
    for name in ("start", "end"):
        for percentile in ("p50", "p90", "p99"):
            ratio = taken[name][percentile] / taken["portal"][percentile]
            print(f"\n{name} {percentile}: {taken[name][percentile] * 1e6:.0f} us, {ratio:.2f}")
            assert ratio <= 3 or percentile == "p99"


def test_idle_means_no_cpu() -> None:
    share = idle_cpu()
    print(f"\nidle with 4,096 waiting: {share:.4%} of a core")
    assert share <= 0.002


def test_memory_of_a_rollout_that_waits() -> None:
    queued, asked = memory(10_000, 1), memory(10_000, 10_000)
    print(f"\nmemory: {queued:.0f} bytes in the queue, {asked:.0f} with a request under way")
    assert queued <= 8 * 1024
