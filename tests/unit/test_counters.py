"""StalenessCounters: its range, and no oversubscription from many threads."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from arealtrio._core.counters import StalenessCounters

THREADS = 10


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Make the interpreter change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_new_run_may_start_one_batch_and_max_staleness_more() -> None:
    counters = StalenessCounters(max_concurrent=100, batch=4, max_staleness=2)
    assert counters.capacity == counters.slack == 12
    assert counters.free == 100


def test_try_submit_takes_all_or_nothing() -> None:
    counters = StalenessCounters(max_concurrent=5, batch=3, max_staleness=0)
    assert not counters.try_submit(4)
    assert counters.capacity == 3
    assert counters.try_submit(3)
    assert counters.capacity == 0
    assert not counters.try_submit()
    assert counters.try_submit(0)


def test_unconditional_submits_go_below_zero_and_come_back() -> None:
    counters = StalenessCounters(max_concurrent=1, batch=1, max_staleness=0)
    counters.submit(3)
    assert counters.capacity == counters.free == counters.slack == -2
    counters.reject(3)
    assert counters.capacity == 1
    assert counters.stats() == (0, -3, 3, 0)


def test_a_charge_takes_budget_and_no_place() -> None:
    counters = StalenessCounters(max_concurrent=10, batch=4, max_staleness=0)
    counters.charge(3)
    assert (counters.free, counters.slack, counters.charged) == (10, 1, 3)


def test_recovery_forgets_charges_because_it_counts_whole_batches() -> None:
    counters = StalenessCounters(max_concurrent=10, batch=4, max_staleness=1, version=5)
    counters.charge(3)
    counters.recover(5, unconsumed=2)
    assert (counters.accepted, counters.charged) == (22, 0)
    assert counters.slack == (1 + 5 + 1) * 4 - 22


def test_grant_checks_at_its_version_and_numbers_in_order() -> None:
    counters = StalenessCounters(max_concurrent=10, batch=1, max_staleness=0)
    assert [counters.grant(version) for version in (0, 0, 1, 1, 0, 2)] == [0, -1, 1, -1, -1, 2]
    assert (counters.granted, counters.version) == (3, 2)


@pytest.mark.parametrize(
    ("concurrent", "batch", "staleness"),
    [(2**23, 1, 0), (1, 1, 2**39), (1, 2**20, 2**19), (1, 2**39 + 1, 0), (2**62, 1, 0)],
)
def test_limits_beyond_the_word_are_refused(concurrent: int, batch: int, staleness: int) -> None:
    with pytest.raises(OverflowError, match="range"):
        StalenessCounters(concurrent, batch, staleness)


def test_the_largest_limits_fit() -> None:
    counters = StalenessCounters(2**23 - 1, 1, 2**39 - 2)
    assert (counters.free, counters.slack) == (2**23 - 1, 2**39 - 1)
    counters._check()


def test_the_repr_shows_what_decides() -> None:
    counters = StalenessCounters(2, 1, 1)
    counters.enqueue(2)
    counters.grant(0)
    assert repr(counters) == (
        "<StalenessCounters [Capacity: 1 | Version: 0 | 0 accepted, 1 enqueued, 0 rejected, "
        "1 running, 0 charged]>"
    )


@pytest.mark.usefixtures("eager_switching")
def test_threads_share_a_budget_exactly() -> None:
    counters = StalenessCounters(max_concurrent=2**22, batch=50_000, max_staleness=3)
    together = Barrier(THREADS)

    def submit_until_full(_: int) -> int:
        granted = 0
        together.wait()
        while counters.try_submit():
            counters.accept()
            granted += 1
        return granted

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(submit_until_full, range(THREADS))) == 200_000
    assert counters.stats() == (200_000, -200_000, 0, 0)
    counters._check()


@pytest.mark.usefixtures("eager_switching")
def test_threads_count_exactly_while_the_version_moves_both_ways() -> None:
    counters = StalenessCounters(max_concurrent=64, batch=10, max_staleness=1)
    rounds = 20_000
    together = Barrier(THREADS)

    def work(_: int) -> int:
        started = 0
        together.wait()
        for _ in range(rounds):
            if counters.try_submit():
                started += 1
                counters.reject()
        return started

    def move(_: int) -> int:
        together.wait()
        for version in range(rounds):
            counters.set_version(version % 7)
        return 0

    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(move if i == 0 else work, i) for i in range(THREADS)]
        started = sum(job.result() for job in jobs)
    assert counters.rejected == started > 0
    assert counters.running == 0
    assert counters.slack == (1 + (rounds - 1) % 7 + 1) * 10
    counters._check()
