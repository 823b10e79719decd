"""How long does a batch of long-tailed requests take, beside the best that any order could do?

The real queue and the real policies, on trio's virtual clock; a server is so many slots and a pace,
and requests that it has no slot for wait inside it, first come, first served. 2,000 requests are
250 groups of 8; lengths are log-normal with p99 ÷ p50 ≈ 9, and half of their log-variance is common
to a group. Baselines: the list schedule of the same trace (each slot that comes free takes the next
request; no scheduler that knows no lengths can promise better), the bound max(work ÷ slots, longest
request), which none can beat, and round robin.

    pytest benchmarks/bench_makespan.py -s        # a minute
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from arealtrio.leases import LeaseQueue, Waiter
from arealtrio.ordering import Line, Origin, make_line
from arealtrio.scheduling import LeastRequestPolicy, RoundRobinPolicy, SchedulePolicy

P50, P99, LONGEST = 266, 2438, 3000  # tokens
SIGMA = math.log(P99 / P50) / statistics.NormalDist().inv_cdf(0.99)
GROUPS, GROUP_SIZE = 250, 8
TRACES = 20


@dataclass(frozen=True)
class Server:
    """So many slots; a token takes ``1 / speed``."""

    slots: int
    speed: float = 1.0


EQUAL = [Server(16)] * 8
UNEQUAL = [Server(8)] * 4 + [Server(24)] * 4
TWO_SLOW = [Server(16)] * 6 + [Server(16, 0.5)] * 2
FLEETS = {"8x16": EQUAL, "4x8 + 4x24": UNEQUAL, "two at half speed": TWO_SLOW}


@dataclass(frozen=True)
class Request:
    """One answer of a known length."""

    prompt: str
    tokens: int


def epochs(seed: int, groups: int = GROUPS, size: int = GROUP_SIZE) -> list[list[Request]]:
    """Two epochs over the same prompts."""
    numbers = random.Random(seed)
    share = SIGMA * math.sqrt(0.5)
    means = [numbers.gauss(math.log(P50), share) for _ in range(groups)]
    return [
        [Request(str(g), draw(numbers, mean, share)) for g, mean in enumerate(means)
         for _ in range(size)]
        for _ in range(2)
    ]  # fmt: skip


def draw(numbers: random.Random, mean: float, sigma: float) -> int:
    return max(1, min(LONGEST, round(math.exp(numbers.gauss(mean, sigma)))))


def bound(requests: Sequence[Request], fleet: Sequence[Server]) -> float:
    """max(work ÷ slots, longest): no schedule on servers of speed 1 is shorter."""
    lengths = [request.tokens for request in requests]
    return max(sum(lengths) / sum(server.slots for server in fleet), *lengths)


def list_schedule(requests: Sequence[Request], fleet: Sequence[Server]) -> float:
    """The makespan where each slot takes the next request at the moment it comes free."""
    slots = [(0.0, 1 / s.speed, n) for n, s in enumerate(fleet) for _ in range(s.slots)]
    heapq.heapify(slots)
    for request in requests:
        free, token_time, server = slots[0]
        heapq.heapreplace(slots, (free + request.tokens * token_time, token_time, server))
    return max(slots)[0]


@dataclass
class Run:
    """One batch on one fleet, and what it took."""

    fleet: Sequence[Server]
    policy: SchedulePolicy
    line: Line[Waiter] = field(default_factory=Line)
    in_flight: int | None = None
    makespan: float = 0.0
    avoidable: float = 0.0  # slot-seconds free while somebody waited
    _seen: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self.queue = LeaseQueue(self.policy, lambda exclude, _: exclude, self.line)
        for number, server in enumerate(self.fleet):
            self.policy.set_cap(str(number), server.slots)

    def __call__(self, requests: Sequence[Request]) -> Run:
        trio.run(self._main, requests, clock=trio.testing.MockClock(autojump_threshold=0))
        return self

    @property
    def avoidable_idle(self) -> float:
        """As a share of all slot-seconds."""
        return self.avoidable / (sum(s.slots for s in self.fleet) * self.makespan)

    async def _main(self, requests: Sequence[Request]) -> None:
        self.inside = [trio.Semaphore(server.slots) for server in self.fleet]
        limit = trio.Semaphore(self.in_flight or len(requests))
        start = trio.current_time()
        self._seen = (start, 0)
        async with trio.open_nursery() as nursery:
            for request in requests:
                await limit.acquire()
                nursery.start_soon(self._one, request, limit)
        self.makespan = trio.current_time() - start

    async def _one(self, request: Request, limit: trio.Semaphore) -> None:
        slot = await self.queue.acquire(frozenset(), 0, None, origin=Origin(request.prompt))
        self._look()
        server = int(slot.address)
        async with self.inside[server]:
            await trio.sleep(request.tokens / self.fleet[server].speed)
        self.queue.learn(request.prompt, request.tokens)
        slot.release()
        self._look()
        limit.release()

    def _look(self) -> None:
        now, (before, idle) = trio.current_time(), self._seen
        self.avoidable += idle * (now - before)
        self._seen = (now, min(self.policy.free(), len(self.queue)))


def longest_first(*, history: bool, seed: int) -> float:
    """Makespan ÷ bound of the second epoch, with or without having seen the first."""
    first, second = epochs(seed)
    line: Line[Waiter] = make_line("longest_expected", len(second))
    if history:
        for request in first:
            line.learn(request.prompt, request.tokens)
    return Run(EQUAL, LeastRequestPolicy(), line)(second).makespan / bound(second, EQUAL)


def fifo(fleet: Sequence[Server], seed: int) -> tuple[float, float]:
    """Makespan ÷ list schedule, and the avoidable idle, of one trace."""
    requests = epochs(seed)[1]
    run = Run(fleet, LeastRequestPolicy())(requests)
    return run.makespan / list_schedule(requests, fleet), run.avoidable_idle


# What motivates least request: requests, and how many are in flight at once (None: all).
CASES = {
    "on-policy burst": (GROUPS, GROUP_SIZE, None),
    "off-policy refill": (GROUPS, GROUP_SIZE, 256),
    "evaluation": (1000, 1, None),
}


def against_round_robin(fleet: Sequence[Server], case: str, seed: int) -> float:
    """Makespan of least request ÷ of round robin as AReaL has it, which enforces no caps."""
    groups, size, in_flight = CASES[case]
    requests = epochs(seed, groups, size)[1]
    least = Run(fleet, LeastRequestPolicy(), in_flight=in_flight)(requests)
    robin = Run(fleet, RoundRobinPolicy(no_block=True), in_flight=in_flight)(requests)
    return least.makespan / robin.makespan


@pytest.mark.parametrize("fleet", FLEETS)
def test_fifo_is_the_list_schedule_and_leaves_no_slot_idle(fleet: str) -> None:
    results = [fifo(FLEETS[fleet], seed) for seed in range(TRACES)]
    ratio = statistics.median(ratio for ratio, _ in results)
    idle = max(idle for _, idle in results)
    print(f"\n{fleet}: {ratio:.4f} of the list schedule, {idle:.3%} of the slots idle for nothing")
    assert ratio <= 1.02
    assert idle <= 0.005


@pytest.mark.parametrize(("history", "most"), [(True, 1.15), (False, 1.25)])
def test_longest_expected_comes_near_the_bound(history: bool, most: float) -> None:
    ratios = [longest_first(history=history, seed=seed) for seed in range(TRACES)]
    median = statistics.median(ratios)
    known = "after an epoch" if history else "siblings only"
    print(f"\n{known}: {median:.3f} of the bound ({min(ratios):.3f} … {max(ratios):.3f})")
    assert median <= most


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fleet", "most"), [("8x16", 1.02), ("4x8 + 4x24", 0.75)])
def test_least_request_against_round_robin(fleet: str, most: float, case: str) -> None:
    ratios = [against_round_robin(FLEETS[fleet], case, seed) for seed in range(TRACES // 2)]
    median = statistics.median(ratios)
    print(f"\n{case} on {fleet}: {median:.3f} of round robin")
    assert median <= most
