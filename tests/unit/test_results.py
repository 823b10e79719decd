from __future__ import annotations

import pytest

from arealtrio.delivery import PermitOrder
from arealtrio.errors import UsageError
from arealtrio.groups import GroupTask
from arealtrio.results import ResultPool
from arealtrio.settlement import RolloutResult
from arealtrio.types import Outcome

from .puppet import Instant


def task(name: str, *, is_eval: bool = False, is_batched: bool = False) -> GroupTask:
    return GroupTask(
        task_id=name,
        data={},
        workflow=Instant(),
        should_accept=None,
        size=1,
        deliver=lambda *_: None,
        is_eval=is_eval,
        is_batched=is_batched,
    )


def result(name: str, number: int | None) -> RolloutResult:
    return RolloutResult(task_id=name, prompt_id=name, outcome=Outcome.REJECTED, number=number)


def names(results: list[RolloutResult]) -> list[str]:
    return [r.task_id for r in results]


@pytest.fixture
def order() -> PermitOrder:
    return PermitOrder(in_order=True)


@pytest.fixture
def pool(order: PermitOrder) -> ResultPool:
    return ResultPool(order)


def test_training_leaves_in_permit_order_and_evaluation_apart(
    pool: ResultPool, order: PermitOrder
) -> None:
    order.granted(0)
    order.granted(1)
    for name, number, is_eval in (("b", 1, False), ("y", 1, True), ("x", 0, True)):
        group = task(name, is_eval=is_eval)
        pool.expect(group)
        if not is_eval:
            order.settled(number)
        pool.deliver(group, result(name, number))
    assert pool.of(is_eval=False).ready == 0
    assert names(pool.take(2, is_eval=True)) == ["x", "y"]
    order.settled(0)
    pool.put(result("a", 0), is_eval=False)
    assert names(pool.take(2, is_eval=False)) == ["a", "b"]
    assert "a" not in pool


def test_what_can_come_is_what_is_here_and_what_is_under_way_unclaimed(pool: ResultPool) -> None:
    first, second, other = task("a"), task("b"), task("e", is_eval=True)
    for group in (first, second, other):
        pool.expect(group)
    assert (pool.coming(is_eval=False), pool.coming(is_eval=True)) == (2, 1)
    pool.claim("a", first)
    assert pool.coming(is_eval=False) == 1
    pool.deliver(second, result("b", 1))
    assert pool.coming(is_eval=False) == 1
    pool.unclaim("a", is_eval=False)
    assert pool.coming(is_eval=False) == 2
    pool.deliver(first, result("a", 0))
    assert pool.coming(is_eval=False) == 2
    pool.take(2, is_eval=False)
    assert pool.coming(is_eval=False) == 0


def test_a_claimed_result_goes_to_its_waiter_alone(pool: ResultPool) -> None:
    group = task("a")
    pool.expect(group)
    assert pool.claim("a", group) is False
    assert "a" in pool
    assert pool.take_claimed("a") is None
    pool.deliver(group, result("a", 0))
    assert pool.of(is_eval=False).ready == 0
    taken = pool.take_claimed("a")
    assert taken is not None
    assert "a" not in pool
    pool.unclaim("a", is_eval=False)  # harmless
    assert pool.coming(is_eval=False) == 0


def test_a_result_that_is_here_is_claimed_out_of_order(
    pool: ResultPool, order: PermitOrder
) -> None:
    order.granted(0)
    group = task("b", is_eval=False)
    pool.expect(group)
    pool.deliver(group, result("b", 1))
    assert pool.is_eval("b") is False
    pool.claim("b", None)
    assert pool.take_claimed("b") is not None


def test_a_given_up_claim_is_anybodys(pool: ResultPool) -> None:
    group = task("a", is_eval=True)
    pool.expect(group)
    assert pool.claim("a", group) is True
    pool.deliver(group, result("a", 0))
    pool.unclaim("a", is_eval=True)
    assert names(pool.take(1, is_eval=True)) == ["a"]


@pytest.mark.parametrize("case", ["unknown", "batched", "claimed", "taken"])
def test_what_is_not_there_can_not_be_claimed_and_nothing_changes(
    case: str, pool: ResultPool
) -> None:
    group = task("a", is_batched=case == "batched")
    live = None if case in ("unknown", "taken") else group
    if case in ("claimed", "taken"):
        pool.expect(group)
    if case == "claimed":
        pool.claim("a", group)
    if case == "taken":
        pool.deliver(group, result("a", 0))
        pool.take(1, is_eval=False)
    before = pool.coming(is_eval=False)
    with pytest.raises(UsageError, match="'a' is not there"):
        pool.claim("a", live)
    assert pool.coming(is_eval=False) == before


def test_what_was_never_admitted_is_nobodys_result(pool: ResultPool) -> None:
    pool.put(result("a", None), is_eval=False)
    assert "a" not in pool
