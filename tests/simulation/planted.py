"""Planted bugs: what the simulation must find, or it proves nothing.

Each breaks the production code in one place, the way a slip would, and leaves everything else as it
is. Some act only now and then, because a bug that shows at once is found by any test.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from arealtrio import (
    batching,
    consumption,
    engine,
    executor,
    groups,
    leases,
    pausing,
    results,
    rollouts,
    servers,
    settlement,
    staleness,
    supervision,
    waiting,
)
from arealtrio.admission import Admission
from arealtrio.delivery import PermitOrder
from arealtrio.errors import RequestRejected, ServerError
from arealtrio.generation import Generation
from arealtrio.trajectory import Group
from arealtrio.wire.vllm import VllmDialect

from .play import Verdict, play

SEEDS_MOST = 500

Target = tuple[Any, str, Callable[[Any], Any]]  # whose, which name, what from what was there


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    Args:
        name: For the command line.
        words: What it does.
        targets: Gives, anew for each run, what to replace.
        expected: The invariants of which one has to find it.
        quick: Whether it is found within a few seeds, and so in every run of the tests.
    """

    name: str
    words: str
    targets: Callable[[], list[Target]]
    expected: tuple[str, ...]
    quick: bool = True

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Have it for the length of the block."""
        with _all(self.targets()):
            yield

    def find(self, start: int = 0, most: int = SEEDS_MOST) -> tuple[int, Verdict] | None:
        """Play seeds until one finds it; return how many that took, and the last one."""
        for number in range(most):
            with self.planted():
                verdict = play(start + number)
            if verdict.violation is not None:
                return number + 1, verdict
        return None


@contextmanager
def _all(targets: list[Target]) -> Iterator[None]:
    if not targets:
        yield
        return
    (owner, name, change), *rest = targets
    with patch.object(owner, name, change(getattr(owner, name))), _all(rest):
        yield


def _every(nth: int, instead: Callable[..., Any]) -> Callable[[Any], Any]:
    """Replace every nth call of a method; ``instead`` is given the original first."""

    def change(original: Any) -> Any:
        calls = count(1)

        def method(*args: Any, **kwargs: Any) -> Any:
            if next(calls) % nth:
                return original(*args, **kwargs)
            return instead(original, *args, **kwargs)

        return method

    return change


def _nothing(_: Any, *__: Any, **___: Any) -> None:
    return None


async def _nothing_async(_: Any, *__: Any, **___: Any) -> None:
    return None


def _accept_twice(original: Any, permit: Any) -> None:
    original(permit)
    permit._counters.submit()
    permit._counters.accept()


def _settle_twice(original: Any, counts: Any, outcome: Any, *, was_running: bool) -> None:
    counts.submitted += 1
    counts.queued += 1
    original(counts, outcome, was_running=was_running)
    original(counts, outcome, was_running=False)


def _older_by_one(original: Any) -> Any:
    return lambda group, version: original(group, version - 1)


def _never_older(_: Any) -> Any:
    return lambda *_: False


def _pinned(_: Any) -> Any:
    """Stamps what it believed when it sent the request, whatever the server reports."""
    return lambda _, lease, answer: (
        np.full(len(answer.token_ids), lease.version, dtype=np.int32),
        True,
    )


def _one_more(original: Any) -> Any:
    def try_submit(manager: Any) -> Any:
        version = manager.version_provider.get_version()
        number = manager._counters.grant(version + 1)
        return staleness.Permit(manager._counters, number, version) if number >= 0 else None

    del original
    return try_submit


def _one_higher(original: Any) -> Any:
    return lambda *args: original(*args) + 1


def _without_last_member(original: Any, task: Any) -> Group:
    group: Group = original(task)
    if len(group) == 1:
        return group
    return Group(
        number=group.number,
        permit_version=group.permit_version,
        prompt_id=group.prompt_id,
        task_id=group.task_id,
        members=group.members[:-1],
    )


def _retries_refusals(original: Any) -> Any:
    def parse_generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RequestRejected as exc:
            raise ServerError("taken for 5xx", status=503) from exc

    return parse_generate


def _gives_one_back(original: Any, stream: Any, number: int) -> Any:
    taken = original(stream, number)
    if taken:
        stream.places.put(taken[0])
    return taken


def _forgets_tokens(original: Any) -> Any:
    def next_segment(generation: Any, *args: Any) -> Any:
        segment = original(generation, *args)
        if generation.failovers and generation.count:
            return msgspec.structs.replace(segment, token_ids=generation.request.input_ids)
        return segment

    return next_segment


def _restores_the_newest(_: Any) -> Any:
    """The defect that the simulation found first: it loads one version and notes another."""

    async def restore_base(pool: Any, server: Any) -> int | None:
        recipe = supervision._recipe_for(pool, server)
        await supervision._load(pool, server, recipe)
        server.labelled = pool.dialect.has_labels if recipe else server.labelled
        server.base_update = pool.base_update
        told: int | None = server.info.weight_version
        return pool.base_version if recipe else told

    return restore_base


def _no_confirmation(_: Any) -> Any:
    async def confirm(*_: Any) -> None:
        return None

    return confirm


BUGS = (
    Bug(
        "skip-release",
        "every 40th slot is not given back",
        lambda: [(leases.LeaseQueue, "release", _every(40, _nothing))],
        ("I4", "I5", "liveness", "calm"),
    ),
    Bug(
        "count-twice",
        "every 10th accepted permit is counted twice",
        lambda: [(staleness.Permit, "accept", _every(10, _accept_twice))],
        ("I1", "I3"),
    ),
    Bug(
        "settle-twice",
        "every 10th settlement is counted as two",
        lambda: [(settlement.RolloutCounts, "settle", _every(10, _settle_twice))],
        ("I1", "crash"),
    ),
    Bug(
        "deliver-after-expiry",
        "what became too old is delivered all the same",
        lambda: [
            (module, "is_older", _never_older)
            for module in (batching, consumption, executor, results, rollouts)
        ],
        ("I6",),
    ),
    Bug(
        "bound-off-by-one",
        "what is too old by one version is delivered",
        lambda: [
            (module, "is_older", _older_by_one)
            for module in (batching, consumption, executor, results, rollouts)
        ],
        ("I6",),
    ),
    Bug(
        "wrong-version",
        "tokens are stamped with the version believed when they were asked for",
        lambda: [(engine, "versions_of", _pinned)],
        ("I8",),
    ),
    Bug(
        "lost-wake-up",
        "every 20th time nobody is told that something changed",
        lambda: [(waiting.WaitList, "notify", _every(20, _nothing))],
        ("I5", "liveness"),
    ),
    Bug(
        "lost-hand-over",
        "every 20th free slot is not offered to those who wait",
        lambda: [(leases.LeaseQueue, "hand_over", _every(20, _nothing))],
        ("I5", "liveness"),
    ),
    Bug(
        "lost-abort",
        "every 3rd request that is given up is not aborted",
        lambda: [(engine.RemoteEngine, "_abort", _every(3, _nothing_async))],
        ("I9",),
    ),
    Bug(
        "drop-member",
        "every 5th group lacks a member",
        lambda: [(groups.GroupTask, "accepted", _every(5, _without_last_member))],
        ("I7",),
    ),
    Bug(
        "retry-refusal",
        "a request that a server refused is sent again",
        lambda: [(VllmDialect, "parse_generate", _retries_refusals)],
        ("refused",),
        quick=False,
    ),
    Bug(
        "oversubscribe",
        "admission counts on the next version",
        lambda: [(staleness.StalenessManager, "try_submit", _one_more)],
        ("I3",),
    ),
    Bug(
        "one-too-many",
        "one member more than allowed runs",
        lambda: [(Admission, "_concurrency_of", _one_higher)],
        ("I2",),
    ),
    Bug(
        "overtake",
        "batches leave without regard to the order of permits",
        lambda: [(PermitOrder, "frontier", lambda _: property(lambda _: float("inf")))],
        ("I6", "I7"),
        quick=False,
    ),
    Bug(
        "deliver-twice",
        "every 5th batch leaves a group behind that it delivers",
        lambda: [(batching.BatchStream, "take", _every(5, _gives_one_back))],
        ("I7", "I1"),
    ),
    Bug(
        "lose-group",
        "every 10th group of a stream reaches no batch",
        lambda: [(batching.BatchStream, "deliver", _every(10, _nothing))],
        ("I7", "I1", "liveness"),
    ),
    Bug(
        "forget-tokens",
        "a generation that goes on elsewhere begins anew, after what it has",
        lambda: [(Generation, "next_segment", _forgets_tokens)],
        ("I8",),
    ),
    Bug(
        "stay-paused",
        "every 5th server that was paused is not resumed",
        lambda: [(pausing.Pausing, "_resume_last_held", _every(5, _nothing_async))],
        ("I9", "liveness", "calm"),
        quick=False,
    ),
    Bug(
        "label-unconfirmed",
        "nobody asks a server which weights it has after an update",
        lambda: [(servers.ServerPool, "confirm", _no_confirmation)],
        ("I8",),
        quick=False,
    ),
    Bug(
        "restore-newest",
        "a server is restored to one version and taken to have a newer one",
        lambda: [(supervision, "_restore_base", _restores_the_newest)],
        ("I8",),
        quick=False,
    ),
)


SEARCHES = 3  # of each bug, from other seeds


def seeds_needed(bug: Bug, start: int, most: int) -> list[int | None]:
    """How many seeds each of several searches took; None is one that found nothing."""
    found = [bug.find(start + search * 10_000, most) for search in range(SEARCHES)]
    return [None if one is None else one[0] for one in found]


def row_of(bug: Bug, needed: list[int | None], most: int) -> str:
    """A line of the table: the bug, the median and the most seeds, or that it was missed."""
    if None in needed:
        return f"{bug.name:22} NOT FOUND within {most} seeds"
    counts = [number for number in needed if number is not None]
    return f"{bug.name:22} median {statistics.median(counts):g}, most {max(counts)}  ({bug.words})"
