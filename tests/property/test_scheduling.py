"""LeastRequestPolicy: always the least loaded of those allowed, in the same order every time."""

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from arealtrio.scheduling import LeastRequestPolicy, RoundRobinPolicy, Slot

NAMES = "abcde"

caps = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5), min_size=1)
steps = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "release", "set_cap", "remove"]),
        st.integers(0, 30),
        st.sets(st.sampled_from(NAMES), max_size=2),
        st.none() | st.sampled_from(NAMES),
    ),
    max_size=60,
)


@given(caps=caps, steps=steps)
def test_least_request_takes_the_least_of_those_allowed(
    caps: dict[str, int], steps: list[tuple[str, int, set[str], str | None]]
) -> None:
    policy = LeastRequestPolicy()
    for server, cap in caps.items():
        policy.set_cap(server, cap)
    held: list[Slot] = []
    for step, number, exclude, prefer in steps:
        if step == "acquire":
            check_acquire(policy, held, exclude, prefer)
        elif step == "release" and held:
            slot = held.pop(number % len(held))
            assert isinstance(policy.release(slot), bool)
        elif step == "set_cap":
            policy.set_cap(NAMES[number % 5], number % 7)
        elif step == "remove" and policy.servers():
            policy.remove(policy.servers()[number % len(policy.servers())])


def check_acquire(
    policy: LeastRequestPolicy, held: list[Slot], exclude: set[str], prefer: str | None
) -> None:
    loads = {
        server: Fraction(policy.outstanding(server), policy.cap(server))
        for server in policy.servers()
        if policy.outstanding(server) < policy.cap(server) and server not in exclude
    }
    slot = policy.acquire(exclude=exclude, prefer=prefer)
    if slot is None:
        assert not loads
        return
    held.append(slot)
    assert slot.server == prefer or (
        prefer not in loads and loads[slot.server] == min(loads.values())
    )


@given(servers=st.integers(1, 6), cap=st.integers(1, 5), rounds=st.integers(1, 5))
def test_equal_servers_are_used_evenly_by_both(servers: int, cap: int, rounds: int) -> None:
    for policy in (LeastRequestPolicy(), RoundRobinPolicy(no_block=False)):
        for server in range(servers):
            policy.set_cap(str(server), cap)
        taken = [policy.acquire() for _ in range(servers * min(rounds, cap))]
        assert None not in taken
        counts = Counter(slot.server for slot in taken if slot is not None)
        assert set(counts.values()) == {min(rounds, cap)}
