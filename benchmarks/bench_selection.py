"""What choosing a server costs: one release and one acquire, at 64, 512 and 4096 servers.

Servers have four different caps and are three quarters full; leases are released in random order.
``empty`` is the same loop over a compiled class that does nothing: the floor for anything called
from Python. ``heapify`` is a list rebuilt with ``heapq.heapify`` after each change and searched by
id on release, as AReaL's pull request 955 does it.

    pytest benchmarks/bench_selection.py
"""

import heapq
import random
from collections.abc import Callable, MutableSequence
from typing import Protocol

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from arealtrio._core.heap import LeastRequestHeap

from .baseline import compile_empty, median_ratio

CAPS = (4, 8, 12, 16)
PAIRS = 2000


class Chooser(Protocol):
    def acquire(self) -> int: ...

    def release(self, lease: int) -> object: ...


class HeapifyPerChange:
    """A lease is the server's id; entries are [load, id, count, cap]."""

    def __init__(self, servers: int) -> None:
        self.entries = [[0.0, i, 0, CAPS[i % len(CAPS)]] for i in range(servers)]

    def acquire(self) -> int:
        top = self.entries[0]
        if top[2] >= top[3]:
            return -1
        self.change(top, 1)
        return int(top[1])

    def release(self, lease: int) -> None:
        for entry in self.entries:
            if entry[1] == lease:
                self.change(entry, -1)
                return

    def change(self, entry: list[float], by: int) -> None:
        entry[2] += by
        entry[0] = entry[2] / entry[3]
        heapq.heapify(self.entries)


class Churn:
    """Release a lease at random and acquire another, so many times a run."""

    def __init__(self, chooser: Chooser, leases: MutableSequence[int], pairs: int) -> None:
        random.Random(0).shuffle(leases)
        self.chooser, self.leases, self.pairs, self.place = chooser, leases, pairs, 0

    def __call__(self) -> None:
        acquire, release, leases = self.chooser.acquire, self.chooser.release, self.leases
        start, end = self.place, min(self.place + self.pairs, len(self.leases))
        for place, lease in enumerate(leases[start:end], start):
            release(lease)
            leases[place] = acquire()
        self.place = end % len(leases)


def three_quarters(servers: int) -> int:
    return sum(CAPS) * servers // len(CAPS) * 3 // 4


def ours(servers: int) -> Churn:
    heap = LeastRequestHeap()
    for i in range(servers):
        heap.add(CAPS[i % len(CAPS)])
    leases = [heap.acquire() for _ in range(three_quarters(servers))]
    return Churn(heap, leases, min(PAIRS, len(leases)))


def empty(servers: int) -> Churn:
    numbers = random.Random(1)
    leases = [numbers.getrandbits(40) for _ in range(three_quarters(servers))]
    return Churn(compile_empty()(), leases, min(PAIRS, len(leases)))


def heapify(servers: int) -> Churn:
    chooser = HeapifyPerChange(servers)
    pairs = max(2, 20_000 // servers)
    leases = [chooser.acquire() for _ in range(min(three_quarters(servers), 16 * pairs))]
    return Churn(chooser, leases, min(pairs, len(leases)))


def per_pair(benchmark: BenchmarkFixture, churn: Churn) -> None:
    benchmark.extra_info["pairs per round"] = churn.pairs
    benchmark.pedantic(churn, rounds=100, warmup_rounds=2)  # type: ignore[no-untyped-call]


def test_selection_64_ours(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, ours(64))


def test_selection_64_empty(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, empty(64))


def test_selection_64_heapify(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, heapify(64))


def test_selection_512_ours(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, ours(512))


def test_selection_512_empty(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, empty(512))


def test_selection_512_heapify(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, heapify(512))


def test_selection_4096_ours(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, ours(4096))


def test_selection_4096_empty(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, empty(4096))


def test_selection_4096_heapify(benchmark: BenchmarkFixture) -> None:
    per_pair(benchmark, heapify(4096))


def ratio(servers: int, other: Callable[[int], Churn], rounds: int) -> float:
    """Return our time for a pair over the other's."""
    mine, theirs = ours(servers), other(servers)
    result = median_ratio(mine, theirs, rounds) * theirs.pairs / mine.pairs
    print(f"\nselection, n={servers}: {result:.4g} of {other.__name__}")
    return result


@pytest.mark.parametrize(("servers", "most"), [(64, 4.0), (512, 4.0), (4096, 5.0)])
def test_selection_stays_near_an_empty_call(servers: int, most: float) -> None:
    assert ratio(servers, empty, rounds=200) <= most


@pytest.mark.parametrize(("servers", "most"), [(64, 1 / 50), (512, 1 / 200), (4096, 1 / 1000)])
def test_selection_is_far_below_a_heap_rebuilt(servers: int, most: float) -> None:
    assert ratio(servers, heapify, rounds=30) <= most
