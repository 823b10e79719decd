"""The two policies: what they share, what each does, and their names."""

from collections import Counter

import pytest

from arealtrio import scheduling
from arealtrio.errors import ConfigError, UsageError
from arealtrio.scheduling import (
    LeastRequestPolicy,
    RoundRobinPolicy,
    SchedulePolicy,
    Slot,
    make_policy,
)


def least_request() -> SchedulePolicy:
    return LeastRequestPolicy()


def round_robin() -> SchedulePolicy:
    return RoundRobinPolicy(no_block=False)


def round_robin_no_block() -> SchedulePolicy:
    return RoundRobinPolicy(no_block=True)


every_policy = pytest.mark.parametrize(
    "make", [least_request, round_robin, round_robin_no_block], ids=lambda make: make.__name__
)


def filled(policy: SchedulePolicy, **caps: int) -> SchedulePolicy:
    for server, cap in caps.items():
        policy.set_cap(server, cap)
    return policy


def take(policy: SchedulePolicy, *exclude: str, prefer: str | None = None) -> Slot:
    slot = policy.acquire(exclude=exclude, prefer=prefer)
    assert slot is not None
    return slot


def order(policy: SchedulePolicy, count: int) -> str:
    return "".join(take(policy).server for _ in range(count))


# ---- every policy


@every_policy
def test_a_slot_counts_until_it_is_released(make: type[SchedulePolicy]) -> None:
    policy = filled(make(), a=2)
    slot = take(policy)
    assert (slot.server, policy.outstanding("a"), policy.free()) == ("a", 1, 1)
    assert policy.release(slot) is True
    assert (policy.outstanding("a"), policy.free()) == (0, 2)


@every_policy
def test_a_double_release_raises_and_changes_nothing(make: type[SchedulePolicy]) -> None:
    policy = filled(make(), a=3)
    first, _ = take(policy), take(policy)
    policy.release(first)
    with pytest.raises(UsageError, match="of server a is not held"):
        policy.release(first)
    assert policy.outstanding("a") == 1


@every_policy
def test_a_removed_server_is_gone_and_its_slots_are_released_late(
    make: type[SchedulePolicy],
) -> None:
    policy = filled(make(), a=2, b=2)
    late = policy.acquire_on("a")
    assert late is not None
    policy.remove("a")
    assert policy.servers() == ("b",)
    assert take(policy).server == "b"
    policy.set_cap("a", 1)  # a new server at the same address
    assert policy.release(late) is False
    assert policy.outstanding("a") == 0
    with pytest.raises(UsageError, match="not held"):
        policy.release(late)


@every_policy
def test_a_drained_server_is_not_chosen_and_takes_its_slots_back(
    make: type[SchedulePolicy],
) -> None:
    policy = filled(make(), a=2, b=2)
    slot = policy.acquire_on("a")
    assert slot is not None
    policy.set_cap("a", 0)
    assert order(policy, 2) == "bb"
    assert policy.acquire_on("a") is None
    assert policy.acquire(prefer="a", exclude=["b"]) is None
    assert policy.outstanding("a") == 1
    assert policy.release(slot) is True
    assert policy.outstanding("a") == 0
    assert policy.cap("a") == 0


@every_policy
def test_a_preferred_server_is_taken_while_it_has_a_free_slot(make: type[SchedulePolicy]) -> None:
    policy = filled(make(), a=4, b=2, c=4)
    assert [take(policy, prefer="b").server for _ in range(2)] == ["b", "b"]
    assert take(policy, prefer="b").server == "a"
    policy.set_cap("b", 3)
    assert take(policy, prefer="elsewhere").server in "bc"
    assert take(policy, "c", prefer="c").server != "c"


@every_policy
def test_no_server_no_slot(make: type[SchedulePolicy]) -> None:
    policy = make()
    assert policy.acquire() is None
    assert policy.acquire(exclude=["a"], prefer="a") is None
    assert policy.servers() == ()
    assert policy.free() == 0
    assert policy.acquire(exclude=["a"]) is None


@every_policy
def test_all_excluded_is_none(make: type[SchedulePolicy]) -> None:
    policy = filled(make(), a=1, b=1)
    assert policy.acquire(exclude={"a", "b", "unknown"}) is None
    assert take(policy, "a", "unknown").server == "b"


@every_policy
def test_an_unknown_server_is_a_usage_error(make: type[SchedulePolicy]) -> None:
    policy = filled(make(), a=1)
    for call in (policy.remove, policy.acquire_on, policy.outstanding, policy.cap):
        with pytest.raises(UsageError, match="server b is not in service"):
            call("b")
    assert policy.servers() == ("a",)


@every_policy
@pytest.mark.parametrize("cap", [-1, 2**20 + 1])
def test_a_cap_out_of_range_is_a_config_error(make: type[SchedulePolicy], cap: int) -> None:
    policy = filled(make(), a=1)
    for server in ("a", "b"):
        with pytest.raises(ConfigError, match=f"server {server}: .*cap must be in"):
            policy.set_cap(server, cap)
    assert policy.servers() == ("a",)
    assert policy.cap("a") == 1


@every_policy
def test_servers_are_listed_in_the_order_they_came(make: type[SchedulePolicy]) -> None:
    policy = filled(make(), b=1, a=1, c=1)
    policy.set_cap("b", 2)
    policy.remove("a")
    policy.set_cap("a", 1)
    assert policy.servers() == ("b", "c", "a")


# ---- least request


def test_least_request_shares_by_cap() -> None:
    assert Counter(order(filled(LeastRequestPolicy(), a=1, b=2, c=4), 7)) == {
        "a": 1,
        "b": 2,
        "c": 4,
    }


def test_least_request_stops_at_the_caps() -> None:
    policy = filled(LeastRequestPolicy(), a=1, b=2)
    order(policy, 3)
    assert policy.acquire() is None
    assert policy.free() == 0


def test_a_slow_server_is_given_less() -> None:
    # AReaL's own case: six requests, of which the first server finishes none.
    policy = filled(LeastRequestPolicy(), a=4, b=4, c=4)
    chosen = []
    for _ in range(6):
        slot = take(policy)
        chosen.append(slot.server)
        if slot.server != "a":
            policy.release(slot)
    assert chosen == ["a", "b", "c", "b", "c", "b"]


# ---- round robin


def test_round_robin_turns() -> None:
    assert order(filled(RoundRobinPolicy(), a=1, b=1, c=1), 7) == "abcabca"


def test_round_robin_waits_for_the_turn_even_while_others_are_free() -> None:
    policy = filled(RoundRobinPolicy(no_block=False), a=1, b=2)
    first = take(policy)
    assert take(policy).server == "b"
    assert policy.acquire() is None
    assert policy.free() == 1
    policy.release(first)
    assert take(policy).server == "a"


def test_round_robin_without_blocking_passes_the_cap() -> None:
    policy = filled(RoundRobinPolicy(no_block=True), a=1)
    assert order(policy, 3) == "aaa"
    assert (policy.outstanding("a"), policy.free()) == (3, 0)


def test_affinity_does_not_use_up_a_turn() -> None:
    policy = filled(RoundRobinPolicy(), a=5, b=5, c=5)
    assert take(policy).server == "a"
    assert take(policy, prefer="c").server == "c"
    assert order(policy, 2) == "bc"


@pytest.mark.parametrize(
    ("taken", "leaver", "then"), [(1, "a", "bc"), (2, "a", "cb"), (1, "b", "ca"), (2, "c", "ab")]
)
def test_the_turn_survives_a_leaver(taken: int, leaver: str, then: str) -> None:
    policy = filled(RoundRobinPolicy(), a=9, b=9, c=9)
    order(policy, taken)
    policy.remove(leaver)
    assert order(policy, 2) == then


def test_a_newcomer_comes_last() -> None:
    policy = filled(RoundRobinPolicy(), a=9, b=9)
    order(policy, 1)
    policy.remove("b")
    policy.set_cap("c", 9)
    assert order(policy, 2) == "ac"


# ---- names


def test_policies_by_name() -> None:
    assert isinstance(make_policy("least_request"), LeastRequestPolicy)
    policy = make_policy("round_robin")
    assert isinstance(policy, RoundRobinPolicy)
    assert not policy.no_block


def test_an_unknown_name_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="one of least_request, round_robin, not 'random'"):
        make_policy("random")


def test_the_names_of_areals_pull_request() -> None:
    assert scheduling.LeastRequestPrioritySchedulePolicy is LeastRequestPolicy
    assert scheduling.RoundRobinSchedulePolicy is RoundRobinPolicy
    assert scheduling.DEFAULT_MAX_CONCURRENT_PER_SERVER == 256


def test_reprs() -> None:
    least, robin = filled(LeastRequestPolicy(), a=2), filled(RoundRobinPolicy(), a=2)
    take(least), take(robin)
    assert repr(least) == (
        "<LeastRequestPolicy <LeastRequestHeap [Servers: 1, 1 ready | Leases: 1 held, 1 free]>>"
    )
    assert repr(robin) == (
        "<RoundRobinPolicy [Servers: 1 | Slots: 1 held, 1 free | no_block: True]>"
    )
