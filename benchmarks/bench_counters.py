"""What admission costs, against a lock per call and against a compiled method that does nothing.

pytest benchmarks/bench_counters.py
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import Protocol

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from arealtrio._core.counters import StalenessCounters

from .baseline import compile_empty, median_ratio

CALLS = 5000
CALLS_A_THREAD = 50_000  # long enough for threads to meet: the interpreter switches every 5 ms
LARGE = 2**22


class Counters(Protocol):
    def try_submit(self) -> bool: ...

    def reject(self) -> None: ...


class LockPerCall:
    """The shape of AReaL's manager: one lock, plain integers, the formula under the lock."""

    def __init__(self, max_concurrent: int, batch: int, max_staleness: int) -> None:
        self.max_concurrent, self.batch, self.max_staleness = max_concurrent, batch, max_staleness
        self.lock = Lock()
        self.version = self.accepted = self.rejected = self.running = 0

    def get_capacity(self) -> int:
        with self.lock:
            return self._capacity()

    def _capacity(self) -> int:
        concurrency = max(1, self.max_concurrent) - self.running
        budget = (self.max_staleness + self.version + 1) * max(1, self.batch)
        return min(concurrency, budget - (self.accepted + self.running))

    def try_submit(self) -> bool:
        with self.lock:
            if self._capacity() <= 0:
                return False
            self.running += 1
            return True

    def reject(self) -> None:
        with self.lock:
            self.running -= 1
            self.rejected += 1


def ours() -> StalenessCounters:
    return StalenessCounters(max_concurrent=LARGE, batch=LARGE, max_staleness=8)


def locked() -> LockPerCall:
    return LockPerCall(LARGE, LARGE, 8)


def calls(method: Callable[[], object]) -> Callable[[], None]:
    """Return a run of one method over and over."""

    def run() -> None:
        for _ in range(CALLS):
            method()

    return run


def pairs(counters: Counters, count: int = CALLS) -> Callable[[], None]:
    """Return a run of submit and settle over and over."""

    def run() -> None:
        try_submit, reject = counters.try_submit, counters.reject
        for _ in range(count):
            try_submit()
            reject()

    return run


def from_threads(counters: Counters, threads: int, pool: ThreadPoolExecutor) -> Callable[[], None]:
    """Return a run of so many threads that submit and settle at once."""
    work, together = pairs(counters, CALLS_A_THREAD), Barrier(threads)

    def one() -> None:
        together.wait()
        work()

    def run() -> None:
        for job in [pool.submit(one) for _ in range(threads)]:
            job.result()

    return run


def test_counters_pair_ours(benchmark: BenchmarkFixture) -> None:
    benchmark(pairs(ours()))


def test_counters_pair_locked(benchmark: BenchmarkFixture) -> None:
    benchmark(pairs(locked()))


def test_counters_pair_ours_4_threads(benchmark: BenchmarkFixture) -> None:
    with ThreadPoolExecutor(4) as pool:
        benchmark(from_threads(ours(), 4, pool))


def test_counters_pair_locked_4_threads(benchmark: BenchmarkFixture) -> None:
    with ThreadPoolExecutor(4) as pool:
        benchmark(from_threads(locked(), 4, pool))


def test_counters_capacity_ours(benchmark: BenchmarkFixture) -> None:
    counters = ours()
    benchmark(calls(lambda: counters.capacity))


def test_counters_capacity_locked(benchmark: BenchmarkFixture) -> None:
    counters = locked()
    benchmark(calls(counters.get_capacity))


@pytest.mark.parametrize("name", ["try_submit", "submit", "accept", "reject", "enqueue"])
def test_an_operation_stays_near_an_empty_call(name: str) -> None:
    nothing = calls(compile_empty()().try_submit)
    ratio = median_ratio(calls(getattr(ours(), name)), nothing, rounds=200)
    print(f"\ncounters, {name}: {ratio:.3g} of an empty method")
    assert ratio <= 1.5


def test_the_capacity_stays_near_an_empty_property() -> None:
    counters, empty = ours(), compile_empty()()
    ratio = median_ratio(calls(lambda: counters.capacity), calls(lambda: empty.capacity), 200)
    print(f"\ncounters, capacity: {ratio:.3g} of an empty property")
    assert ratio <= 1.5


def test_submit_and_settle_is_a_tenth_of_a_lock_per_call() -> None:
    ratio = median_ratio(pairs(ours()), pairs(locked()), rounds=100)
    print(f"\ncounters, submit and settle, 1 thread: 1/{1 / ratio:.3g} of a lock per call")
    assert ratio <= 1 / 10


def test_submit_and_settle_is_a_twentieth_of_a_lock_per_call_from_four_threads() -> None:
    with ThreadPoolExecutor(4) as mine, ThreadPoolExecutor(4) as theirs:
        ratio = median_ratio(
            from_threads(ours(), 4, mine), from_threads(locked(), 4, theirs), rounds=7
        )
    print(f"\ncounters, submit and settle, 4 threads: 1/{1 / ratio:.3g} of a lock per call")
    assert ratio <= 1 / 20
