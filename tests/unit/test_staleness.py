"""StalenessManager: what AReaL's does, what it does not, and permits."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from threading import Barrier

import pytest

from arealtrio.errors import ConfigError, UsageError
from arealtrio.staleness import Permit, RolloutStat, StalenessManager

THREADS = 10


class Provider:
    """A version provider whose version a test sets."""

    def __init__(self, version: int = 0) -> None:
        self.version = version

    def get_version(self) -> int:
        return self.version


def manager_of(
    concurrent: int = 100, batch: int = 4, staleness: int = 1, version: int = 0
) -> tuple[StalenessManager, Provider]:
    provider = Provider(version)
    return StalenessManager(provider, concurrent, batch, staleness), provider


def granted(manager: StalenessManager) -> Permit:
    permit = manager.try_submit()
    assert permit is not None
    return permit


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Make the interpreter change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# ---- as AReaL's


def test_areal_attributes_are_public() -> None:
    manager, provider = manager_of(concurrent=7, batch=4, staleness=2)
    assert manager.version_provider is provider
    assert manager.max_concurrent_rollouts == 7
    assert manager.consumer_batch_size == 4
    assert manager.max_staleness == 2
    with manager.lock:
        assert manager.get_capacity() == 7  # AReaL's own would wait for itself here


def test_capacity_is_the_smaller_of_concurrency_and_staleness() -> None:
    manager, provider = manager_of(concurrent=10, batch=4, staleness=1)
    assert manager.get_capacity() == 8
    provider.version = 1
    assert manager.get_capacity() == 10
    for _ in range(3):
        manager.on_rollout_submitted()
    assert manager.get_capacity() == 7
    for _ in range(3):
        manager.on_rollout_accepted()
    assert manager.get_capacity() == 9


def test_a_rejection_gives_its_budget_back_and_an_acceptance_does_not() -> None:
    manager, _ = manager_of(batch=2, staleness=0)
    manager.on_rollout_submitted()
    manager.on_rollout_rejected()
    assert manager.get_capacity() == 2
    manager.on_rollout_submitted()
    manager.on_rollout_accepted()
    assert manager.get_capacity() == 1


def test_capacity_may_be_negative_when_the_version_goes_back() -> None:
    manager, provider = manager_of(batch=4, staleness=0, version=2)
    for _ in range(12):
        manager.on_rollout_submitted()
    provider.version = 0
    assert manager.get_capacity() == -8
    assert manager.try_submit() is None


def test_accept_without_submit_leaves_running_at_minus_one() -> None:
    manager, _ = manager_of()
    manager.on_rollout_accepted()
    assert manager.get_stats() == RolloutStat(accepted=1, running=-1)


def test_zero_limits_count_as_one_but_not_in_the_pending_limit() -> None:
    manager, _ = manager_of(concurrent=0, batch=0, staleness=0)
    assert manager.get_capacity() == 1
    assert manager.get_pending_limit() == 0


def test_the_pending_limit_is_the_plain_product() -> None:
    manager, provider = manager_of(batch=4, staleness=3)
    provider.version = 9
    assert manager.get_pending_limit() == 16


def test_the_order_of_counting() -> None:
    manager, _ = manager_of()
    manager.on_rollout_enqueued()
    assert manager.get_stats() == RolloutStat(enqueued=1)
    manager.on_rollout_submitted()
    assert manager.get_stats() == RolloutStat(running=1)
    manager.on_rollout_rejected()
    assert manager.get_stats() == RolloutStat(rejected=1)


def test_stats_are_a_copy_and_rollout_stat_is_live_and_read_only() -> None:
    manager, _ = manager_of()
    copy, live = manager.get_stats(), manager.rollout_stat
    manager.on_rollout_enqueued()
    assert (copy.enqueued, live.enqueued) == (0, 1)
    with pytest.raises(AttributeError):
        live.enqueued = 5  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        copy.enqueued = 5  # type: ignore[misc]
    assert live.enqueued == 1
    assert repr(live) == (
        "<RolloutStatView of RolloutStat(accepted=0, enqueued=1, rejected=0, running=0)>"
    )


def test_recovery_counts_every_earlier_batch_as_accepted() -> None:
    manager, provider = manager_of(batch=4, staleness=1)
    provider.version = 5
    manager.on_version_recovered(5)
    assert manager.get_stats().accepted == 20
    assert manager.get_capacity() == 8


def test_recovery_with_a_zero_batch_counts_one_a_version() -> None:
    manager, _ = manager_of(batch=0)
    manager.on_version_recovered(3)
    assert manager.get_stats().accepted == 3


# ---- not as AReaL's


def test_the_version_is_asked_for_outside_any_lock() -> None:
    manager, _ = manager_of()

    class Asking(Provider):
        def get_version(self) -> int:
            assert not manager.lock.locked()
            manager.on_rollout_enqueued()  # would wait for ever inside AReaL's
            return 0

    manager.version_provider = Asking()
    manager.get_capacity()
    manager.try_submit()
    assert manager.get_stats().enqueued == 1


def test_the_version_is_not_asked_for_before_the_first_check() -> None:
    class Unready:
        def get_version(self) -> int:
            raise RuntimeError("not connected")

    manager = StalenessManager(Unready(), 1, 1, 0)
    manager.on_rollout_enqueued()
    with pytest.raises(RuntimeError, match="not connected"):
        manager.try_submit()
    assert manager.get_stats() == RolloutStat(enqueued=1)


def test_limits_can_change_while_running() -> None:
    manager, _ = manager_of(concurrent=2, batch=4, staleness=1)
    granted(manager)
    manager.max_concurrent_rollouts = 5
    assert manager.get_capacity() == 4
    manager.max_staleness = 0
    assert manager.get_capacity() == 3
    manager.consumer_batch_size = 1
    assert manager.get_capacity() == 0


def test_limits_beyond_the_counters_are_refused_and_change_nothing() -> None:
    with pytest.raises(ConfigError, match="out of range"):
        StalenessManager(Provider(), 2**23, 1, 0)
    manager, _ = manager_of(staleness=1)
    with pytest.raises(ConfigError, match="out of range"):
        manager.max_staleness = 10**12
    assert manager.max_staleness == 1
    assert manager.get_capacity() == 8


def test_a_version_beyond_the_counters_raises_and_changes_nothing() -> None:
    manager, provider = manager_of(batch=4)
    provider.version = 2**38
    with pytest.raises(OverflowError, match="range"):
        manager.try_submit()
    provider.version = 0
    assert manager.get_capacity() == 8
    assert manager.get_stats() == RolloutStat()


def test_a_short_batch_buys_nothing() -> None:
    manager, provider = manager_of(batch=4, staleness=0)
    for _ in range(4):
        granted(manager).accept()
    manager.charge(4 - 3)  # one of the four is left over
    provider.version = 1
    assert manager.charged == 1
    assert manager.get_capacity() == 3


def test_what_is_dropped_before_it_was_consumed_gives_its_budget_back() -> None:
    manager, _ = manager_of(batch=2, staleness=0)
    for _ in range(2):
        granted(manager).accept()
    assert manager.try_submit() is None
    manager.discard(1)
    assert (manager.get_stats().accepted, manager.get_stats().rejected) == (1, 1)
    assert manager.try_submit() is not None


# ---- permits


def test_permits_are_numbered_and_carry_their_version() -> None:
    manager, provider = manager_of(batch=1, staleness=0)
    first = granted(manager)
    assert manager.try_submit() is None
    provider.version = 1
    second = granted(manager)
    assert [(p.number, p.version) for p in (first, second)] == [(0, 0), (1, 1)]


def test_a_number_is_never_used_again() -> None:
    manager, _ = manager_of(batch=1, staleness=0)
    granted(manager).reject()
    assert granted(manager).number == 1


def test_leaving_a_permit_unsettled_is_a_rejection() -> None:
    manager, _ = manager_of(batch=1, staleness=0)
    with granted(manager) as permit:
        assert manager.get_capacity() == 0
        assert not permit.settled
    assert permit.settled
    assert manager.get_stats() == RolloutStat(enqueued=-1, rejected=1)
    assert manager.get_capacity() == 1


def test_a_raise_within_a_permit_is_a_rejection_and_goes_on() -> None:
    manager, _ = manager_of()
    with pytest.raises(KeyboardInterrupt), granted(manager):
        raise KeyboardInterrupt
    assert manager.get_stats().rejected == 1
    assert manager.get_stats().running == 0


def test_an_accepted_permit_stays_accepted_whatever_comes_after() -> None:
    manager, _ = manager_of()

    def fail_after_acceptance() -> None:
        with granted(manager) as permit:
            permit.accept()
            raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        fail_after_acceptance()
    assert manager.get_stats() == RolloutStat(accepted=1, enqueued=-1)


@pytest.mark.parametrize("first", ["accept", "reject"])
@pytest.mark.parametrize("second", ["accept", "reject", "__enter__"])
def test_settling_twice_raises_and_changes_nothing(first: str, second: str) -> None:
    manager, _ = manager_of()
    permit = granted(manager)
    getattr(permit, first)()
    before = manager.get_stats()
    with pytest.raises(UsageError, match="permit 0 is settled"):
        getattr(permit, second)()
    assert manager.get_stats() == before
    assert permit.settled


def test_reprs() -> None:
    manager, _ = manager_of(concurrent=2, batch=4, staleness=1)
    permit = granted(manager)
    assert repr(permit) == "<Permit 0 of version 0, held>"
    permit.accept()
    assert repr(permit) == "<Permit 0 of version 0, settled>"
    assert repr(manager).startswith(
        "<StalenessManager [Limits: 2 concurrent, batch 4, staleness 1] <StalenessCounters "
    )


@pytest.mark.usefixtures("eager_switching")
def test_threads_never_oversubscribe_while_the_version_moves() -> None:
    batch, staleness, last_version = 50, 2, 60
    manager, provider = manager_of(concurrent=2**20, batch=batch, staleness=staleness)
    together = Barrier(THREADS)

    def submit(_: int) -> list[Permit]:
        permits: list[Permit] = []
        together.wait()
        while provider.version < last_version:
            permit = manager.try_submit()
            if permit is not None:
                assert permit.number < (staleness + provider.version + 1) * batch
                permit.accept()
                permits.append(permit)
        return permits

    def advance() -> list[Permit]:
        together.wait()
        while provider.version < last_version:
            if manager.get_capacity() <= 0:
                provider.version += 1
        return []

    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(submit, i) for i in range(THREADS - 1)]
        pool.submit(advance).result()
        per_thread = [job.result() for job in jobs]

    for permits in per_thread:
        numbers = [permit.number for permit in permits]
        assert numbers == sorted(numbers)
    everything = sorted((p for permits in per_thread for p in permits), key=lambda p: p.number)
    assert [p.number for p in everything] == list(range(len(everything)))
    # Nothing here is rejected, so a permit's rank is its number: within its own version's budget.
    assert all(p.number < (staleness + p.version + 1) * batch for p in everything)
    assert len(everything) >= (staleness + last_version) * batch
    assert manager.get_stats().running == 0
    assert manager.get_stats().accepted == len(everything)
