"""LeastRequestHeap: the rules of choice one by one, leases, limits, threads."""

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from arealtrio._core.heap import LeastRequestHeap

THREADS = 10


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Make the interpreter change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def heap_of(*caps: int) -> LeastRequestHeap:
    """Return a heap whose slots are 0, 1, 2, … in the order of the caps."""
    heap = LeastRequestHeap()
    assert [heap.add(cap) for cap in caps] == list(range(len(caps)))
    return heap


def picks(heap: LeastRequestHeap, count: int) -> list[int]:
    """Acquire so many leases; return whose they are."""
    return [heap.slot_of(heap.acquire()) for _ in range(count)]


def test_equal_servers_are_taken_in_rotation() -> None:
    assert picks(heap_of(3, 3, 3), 9) == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_a_tie_goes_to_the_server_unchanged_for_longest() -> None:
    heap = heap_of(4, 4, 4)
    leases = [heap.acquire() for _ in range(3)]
    for lease in (leases[1], leases[2], leases[0]):
        heap.release(lease)
    assert picks(heap, 3) == [1, 2, 0]


def test_load_is_a_share_of_the_cap() -> None:
    assert Counter(picks(heap_of(2, 4, 8), 7)) == {0: 1, 1: 2, 2: 4}


def test_equal_fractions_of_unequal_caps_tie() -> None:
    heap = heap_of(3, 9, 6)
    for slot, count in ((0, 1), (1, 3), (2, 2)):
        for _ in range(count):
            heap.acquire_on(slot)
    assert picks(heap, 3) == [0, 1, 2]


def test_the_closest_fractions_are_told_apart() -> None:
    # (n-1)/n and (n-2)/(n-1) at the largest cap: they differ by 1/(n·(n-1)).
    heap = heap_of(2**20, 2**20 - 1)
    for slot, count in ((0, 2**20 - 1), (1, 2**20 - 2)):
        for _ in range(count):
            heap.acquire_on(slot)
    assert picks(heap, 1) == [1]
    heap._check()


def test_all_full_is_minus_one() -> None:
    heap = heap_of(1, 0)
    lease = heap.acquire()
    assert heap.acquire() == -1
    assert heap.acquire_on(0) == heap.acquire_on(1) == -1
    assert heap.acquire_excluding([]) == -1
    assert heap.release(lease) == 0
    assert heap.acquire() >= 0
    assert LeastRequestHeap().acquire() == -1


def test_draining_keeps_leases_and_takes_no_more() -> None:
    heap = heap_of(2, 2)
    lease = heap.acquire_on(0)
    heap.set_cap(0, 0)
    assert picks(heap, 2) == [1, 1]
    assert heap.acquire() == -1
    assert heap.outstanding(0) == 1
    assert heap.release(lease) == 0
    assert heap.outstanding(0) == 0
    heap.set_cap(0, 1)
    assert picks(heap, 1) == [0]


def test_a_lowered_cap_waits_for_the_surplus_to_return() -> None:
    heap = heap_of(4)
    leases = [heap.acquire() for _ in range(4)]
    heap.set_cap(0, 2)
    assert heap.free == 0
    for lease in leases[:2]:
        heap.release(lease)
        assert heap.acquire() == -1
    heap.release(leases[2])
    assert heap.free == 1
    assert picks(heap, 1) == [0]
    heap._check()


def test_a_double_release_raises_while_other_leases_of_the_server_live() -> None:
    heap = heap_of(8)
    first, second = heap.acquire(), heap.acquire()
    heap.release(first)
    again = heap.acquire()  # in the record of the first
    with pytest.raises(ValueError, match="released before"):
        heap.release(first)
    assert heap.outstanding(0) == 2
    assert heap.release(second) == heap.release(again) == 0


def test_a_late_release_of_a_removed_server_is_harmless() -> None:
    heap = heap_of(2, 2)
    late = heap.acquire_on(0)
    heap.remove(0)
    newcomer = heap.add(2)
    assert newcomer != 0  # while a lease of the old one is out
    assert heap.slot_of(late) == -1
    assert heap.release(late) == -1
    assert heap.outstanding(newcomer) == 0
    with pytest.raises(ValueError, match="not held"):
        heap.release(late)
    assert heap.add(1) == 0
    heap._check()


def test_excluded_servers_are_passed_over_and_keep_their_places() -> None:
    heap = heap_of(4, 4, 4, 4)
    assert heap.slot_of(heap.acquire_excluding({0, 1})) == 2
    assert heap.acquire_excluding(range(4)) == -1
    assert picks(heap, 3) == [0, 1, 3]
    heap._check()


def test_excluding_asks_its_argument_before_it_looks_at_anything() -> None:
    heap = heap_of(1, 1)

    def meddling() -> Iterator[int]:
        heap.acquire_on(1)
        yield 0

    assert heap.acquire_excluding(meddling()) == -1
    with pytest.raises(TypeError):
        heap.acquire_excluding(["0"])  # type: ignore[list-item]
    heap._check()


def test_too_many_slots_in_all_are_refused() -> None:
    heap = heap_of(*[2**20] * 16)
    with pytest.raises(OverflowError, match="at most 16777216"):
        heap.add(1)
    assert len(heap) == 16
    heap.set_cap(0, 2**20 - 1)
    newcomer = heap.add(1)
    with pytest.raises(OverflowError, match="at most 16777216"):
        heap.set_cap(newcomer, 2)
    assert heap.cap(newcomer) == 1
    heap._check()


def test_the_repr_counts() -> None:
    heap = heap_of(1, 2)
    heap.acquire_on(0)
    assert repr(heap) == "<LeastRequestHeap [Servers: 2, 1 ready | Leases: 1 held, 2 free]>"


@pytest.mark.usefixtures("eager_switching")
def test_threads_never_pass_a_cap_and_lose_nothing() -> None:
    caps = (1, 2, 3, 5, 8)
    heap = heap_of(*caps)

    together = Barrier(THREADS)

    def work(seed: int) -> int:
        taken, held = 0, []
        together.wait()
        for step in range(20_000):
            lease = heap.acquire_excluding([seed % 5]) if step % 3 == 0 else heap.acquire()
            if lease >= 0:
                taken += 1
                held.append(lease)
            if len(held) > 2 or lease < 0:
                for lease in held:
                    heap.release(lease)
                held.clear()
        for lease in held:
            heap.release(lease)
        return taken

    def watch() -> int:
        return max(heap.outstanding(slot) - cap for slot, cap in enumerate(caps))

    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(work, seed) for seed in range(THREADS)]
        over = [watch() for _ in range(5000)]
        assert all(job.result() > 0 for job in jobs)
    assert max(over) <= 0
    assert heap.total_outstanding == 0
    assert heap.free == sum(caps)
    heap._check()
