"""ResultPool: the results of ``submit``, until somebody takes them. No waiter takes another's."""

from __future__ import annotations

from .delivery import DeliveryQueue, PermitOrder
from .errors import UsageError
from .groups import GroupTask
from .lateness import expired, is_older
from .settlement import RolloutResult


class ResultPool:
    """Results by their order, for ``wait``, and by their id, for ``wait_for_task``.

    Training and evaluation are apart: evaluation has no permits, hence no order to keep.

    Args:
        order: Of the training permits.
    """

    def __init__(self, order: PermitOrder) -> None:
        self._training = DeliveryQueue[RolloutResult](order)
        self._evaluation = DeliveryQueue[RolloutResult](PermitOrder(in_order=False))
        self._held: dict[str, bool] = {}  # task id of a result in one of the two -> is_eval
        self._claimed: dict[str, RolloutResult | None] = {}  # task id wait_for_task waits for
        # is_eval -> groups under way that nobody has claimed; counted, because every settlement
        # asks for it
        self._under_way = {False: 0, True: 0}

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._held or task_id in self._claimed

    def of(self, *, is_eval: bool) -> DeliveryQueue[RolloutResult]:
        """The results that ``wait`` may take."""
        return self._evaluation if is_eval else self._training

    def is_eval(self, task_id: str) -> bool | None:
        """Whether a result that is here is of evaluation; None if it is not here."""
        return self._held.get(task_id)

    def coming(self, *, is_eval: bool) -> int:
        """Results that ``wait`` can ever take as things are: those here, and those under way."""
        queue = self._evaluation if is_eval else self._training
        return len(queue) + self._under_way[is_eval]

    def expect(self, group: GroupTask) -> None:
        """A group was submitted, and will be delivered."""
        self._under_way[group.is_eval] += 1

    def deliver(self, group: GroupTask, result: RolloutResult) -> None:
        """A group settled: to its own waiter if it has one, else to the pool."""
        if result.task_id in self._claimed:
            self._claimed[result.task_id] = result
        else:
            self._under_way[group.is_eval] -= 1
            self.put(result, is_eval=group.is_eval)

    def put(self, result: RolloutResult, *, is_eval: bool) -> None:
        """Add a result, or give back one that was not delivered."""
        if result.number is None:
            return  # withdrawn before it was admitted, which only closing does: nobody can ask
        self._held[result.task_id] = is_eval
        (self._evaluation if is_eval else self._training).put(result)

    def take(self, count: int, *, is_eval: bool) -> list[RolloutResult]:
        """Remove the first ``count`` results; never more than are ready."""
        taken = self.of(is_eval=is_eval).take(count)
        for result in taken:
            del self._held[result.task_id]
        return taken

    def expire_older(self, oldest: int, version: int) -> int:
        """Put expired results in the place of accepted ones that nobody took in time.

        Args:
            oldest: The oldest admissible version.
            version: The trainer's.

        Returns:
            How many: the budget of each is to be given back.
        """
        old = self._training.take_where(
            lambda result: result.group is not None and is_older(result.group, oldest)
        )
        for result in old:
            assert result.group is not None
            self._training.put(expired(result.group, version))
        return len(old)

    def claim(self, task_id: str, live: GroupTask | None) -> bool:
        """Reserve one task's result for one waiter, and say whether it is of evaluation.

        Args:
            task_id: Of the task.
            live: Its group, if it has not settled.

        Raises:
            UsageError: If it was never submitted, or its result is taken or claimed.
        """
        is_eval = self._held.pop(task_id, live.is_eval if live else None)
        if is_eval is None or (live and live.is_batched) or task_id in self._claimed:
            raise UsageError(
                f"task {task_id!r} is not there: never submitted, taken, or waited for already"
            )
        if live:
            self._under_way[is_eval] -= 1
        self._claimed[task_id] = None if live else self.of(is_eval=is_eval).pop_task(task_id)
        return is_eval

    def take_claimed(self, task_id: str) -> RolloutResult | None:
        """Take a claimed result if it has come; the claim ends with it."""
        result = self._claimed[task_id]
        if result is not None:
            del self._claimed[task_id]
        return result

    def unclaim(self, task_id: str, *, is_eval: bool) -> None:
        """End a claim. If its waiter gave up, the result, come or yet to come, is anybody's."""
        if task_id not in self._claimed:
            return
        result = self._claimed.pop(task_id)
        if result is None:
            self._under_way[is_eval] += 1
        else:
            self.put(result, is_eval=is_eval)
