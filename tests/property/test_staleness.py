"""StalenessManager: AReaL's answers to any calls, and the bound that consumption in order gives."""

from dataclasses import dataclass, field

from hypothesis import example, given
from hypothesis import strategies as st

from arealtrio.staleness import Permit, StalenessManager

from ..models.staleness import LockedStalenessManager

CALLS = ("on_rollout_enqueued", "on_rollout_submitted", "on_rollout_accepted",
         "on_rollout_rejected", "try_submit")  # fmt: skip


@dataclass
class Provider:
    version: int = 0

    def get_version(self) -> int:
        return self.version


@given(
    concurrent=st.integers(-1, 12),
    batch=st.integers(-1, 6),
    staleness=st.integers(-1, 6),
    calls=st.lists(st.sampled_from(CALLS) | st.integers(-4, 20), max_size=60),
)
def test_answers_as_areals_does(
    concurrent: int, batch: int, staleness: int, calls: list[str | int]
) -> None:
    provider = Provider()
    ours = StalenessManager(provider, concurrent, batch, staleness)
    areals = LockedStalenessManager(provider, concurrent, batch, staleness)
    for call in calls:
        if isinstance(call, int):
            provider.version = call
        elif call == "try_submit":
            assert (ours.try_submit() is not None) == areals.try_submit()
        else:
            getattr(ours, call)()
            getattr(areals, call)()
        stat = ours.get_stats()
        assert (stat.accepted, stat.enqueued, stat.rejected, stat.running) == (
            areals.accepted, areals.enqueued, areals.rejected, areals.running)  # fmt: skip
        assert ours.get_capacity() == areals.get_capacity()
    assert ours.get_pending_limit() == areals.get_pending_limit()


@given(version=st.integers(0, 50), running=st.integers(0, 5), batch=st.integers(0, 5))
def test_recovers_as_areals_does(version: int, running: int, batch: int) -> None:
    provider = Provider(version)
    managers = (
        StalenessManager(provider, 9, batch, 2),
        LockedStalenessManager(provider, 9, batch, 2),
    )
    for manager in managers:
        for _ in range(running):
            manager.on_rollout_submitted()
        manager.on_version_recovered(version)
    ours, areals = managers
    assert ours.get_capacity() == areals.get_capacity()
    assert ours.get_stats().accepted == areals.accepted


@dataclass
class InOrder:
    """A trainer that consumes by permit number: the lowest B, once every lower one has settled."""

    batch: int
    staleness: int
    provider: Provider = field(default_factory=Provider)
    running: list[Permit] = field(default_factory=list)
    accepted: list[Permit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.manager = StalenessManager(self.provider, 10**6, self.batch, self.staleness)

    def start(self) -> None:
        permit = self.manager.try_submit()
        if permit is not None:
            self.running.append(permit)

    def settle(self, which: int, accept: bool) -> None:
        if self.running:
            permit = self.running.pop(which % len(self.running))
            if accept:
                permit.accept()
                self.accepted.append(permit)
            else:
                permit.reject()

    def consume(self) -> None:
        """Release the B lowest if they are there and every lower one has settled."""
        self.accepted.sort(key=lambda permit: permit.number)
        first_running = min((permit.number for permit in self.running), default=10**9)
        leaving = self.accepted[: self.batch]
        if len(leaving) == self.batch and leaving[-1].number < first_running:
            self.release(leaving)

    def flush(self) -> None:
        """Release a short batch: all there is, once nothing runs, as at the end of the data."""
        if not self.running and len(self.accepted) < self.batch:
            self.release(list(self.accepted))

    def release(self, leaving: list[Permit]) -> None:
        for permit in leaving:
            assert self.provider.version - permit.version <= self.staleness
            self.accepted.remove(permit)
        self.manager.charge(self.batch - len(leaving))
        self.provider.version += 1


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "start", "start", "accept", "accept", "reject", "consume", "flush"]
        ),
        st.integers(0, 20),
    ),
    max_size=200,
)


@given(batch=st.integers(1, 4), staleness=st.integers(0, 3), steps=steps)
# Without the charge, the flush of nothing would leave room for a second batch, late by one version.
@example(
    batch=1,
    staleness=0,
    steps=[
        (step, 0) for step in ("flush", "start", "start", "accept", "accept", "consume", "consume")
    ],
)
def test_consumed_in_order_nothing_is_too_old(
    batch: int, staleness: int, steps: list[tuple[str, int]]
) -> None:
    trainer = InOrder(batch, staleness)
    for step, number in steps:
        if step == "start":
            trainer.start()
        elif step == "consume":
            trainer.consume()
        elif step == "flush":
            trainer.flush()
        else:
            trainer.settle(number, step == "accept")
