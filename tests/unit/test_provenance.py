"""Which weights made which token: what is believed, and what no answer may say (invariant I8)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from arealtrio.config import RolloutConfig
from arealtrio.errors import ProtocolError
from arealtrio.generation import Generation
from arealtrio.ordering import Origin
from arealtrio.provenance import versions_of
from arealtrio.servers import Lease, ServerPool
from arealtrio.types import GenerationHyperparameters, ModelRequest
from arealtrio.wire.dialect import SegmentResponse, VersionSpan

from .test_servers import A, B, pool_of


def answer(
    count: int, *spans: tuple[int | None, int, int], logprobs: int | None = None
) -> SegmentResponse:
    """So many tokens, of the weights that the spans name; without any, nothing is reported."""
    return SegmentResponse(
        token_ids=np.arange(count, dtype=np.int32),
        logprobs=np.zeros(count if logprobs is None else logprobs, dtype=np.float32),
        stop_reason="length",
        versions=tuple(VersionSpan(*span) for span in spans) or None,
    )


@asynccontextmanager
async def leased(version: int, *, labelled: bool) -> AsyncIterator[tuple[ServerPool, Lease]]:
    """A slot on the first of two servers, all of which have a version."""
    pool = pool_of({A: 1, B: 1})
    for server in pool.servers:
        server.version = server.told = version
        server.labelled = labelled
    pool.advance(version, ())
    with await pool.lease(prefer=A) as lease:
        yield pool, lease


async def test_what_the_server_reports_wins() -> None:
    async with leased(3, labelled=True) as (pool, lease):
        pool.told(4)
        lease.server.told = 4  # an update is under way
        versions, exact = versions_of(pool, lease, answer(5, (3, 0, 2), (4, 2, 5)))
        assert (versions.tolist(), exact) == ([3, 3, 4, 4, 4], True)


@pytest.mark.parametrize("updated", [False, True])
async def test_without_a_report_it_is_the_pinned_version_and_exact_without_an_update(
    updated: bool,
) -> None:
    async with leased(3, labelled=True) as (pool, lease):
        lease.server.version += updated
        versions, exact = versions_of(pool, lease, answer(2))
        assert (versions.tolist(), exact) == ([3, 3], not updated)


async def test_a_label_that_is_none_of_ours_is_the_pinned_version_and_not_exact() -> None:
    async with leased(3, labelled=False) as (pool, lease):
        versions, exact = versions_of(pool, lease, answer(2, (None, 0, 2)))
        assert (versions.tolist(), exact) == ([3, 3], False)


@pytest.mark.parametrize("reported", [2, 4, None])
async def test_a_server_of_other_weights_than_believed_is_stale_and_what_it_does_is_lost(
    reported: int | None,
) -> None:
    async with leased(3, labelled=True) as (pool, lease):
        with pytest.raises(ProtocolError, match=f"{A}: it reports version {reported}, not 3"):
            versions_of(pool, lease, answer(2, (reported, 0, 2)))
        assert [row.state for row in pool.statistics()] == ["stale", "ready"]


async def test_weights_that_nobody_told_a_server_to_load_are_refused() -> None:
    async with leased(3, labelled=False) as (pool, lease):
        with pytest.raises(ProtocolError, match=r"version 9, .* beyond 3: does another trainer"):
            versions_of(pool, lease, answer(2, (9, 0, 2)))


async def test_tokens_from_before_a_label_came_back_are_refused() -> None:
    """The server was restarted and labelled anew while the answer was made."""
    async with leased(3, labelled=True) as (pool, lease):
        with pytest.raises(ProtocolError, match="it was restarted"):
            versions_of(pool, lease, answer(2, (None, 0, 1), (3, 1, 2)))


BROKEN = {
    "more tokens than asked for": (answer(5), [3] * 5, "answered 5 tokens and 5 logprobs"),
    "a logprob too few": (answer(2, logprobs=1), [3] * 2, "answered 2 tokens and 1 logprobs"),
    "versions that go back": (answer(2), [4, 3], "versions that go back"),
    "older than its last token": (answer(2), [2, 2], "versions that go back, or below 3"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_an_answer_that_breaks_the_invariant_changes_nothing(name: str) -> None:
    broken, versions, words = BROKEN[name]
    async with leased(3, labelled=True) as (_, lease):
        gconfig = GenerationHyperparameters(max_new_tokens=8)
        generation = Generation(ModelRequest([1], gconfig), "r", 8, Origin(None, 0))
        segment = generation.next_segment(RolloutConfig(servers=[A], segment_tokens=4), lease)
        generation.take(A, segment, answer(4), np.full(4, 3, dtype=np.int32), True)
        before = generation.response(0.0)
        with pytest.raises(ProtocolError, match=words):
            generation.take(B, segment, broken, np.array(versions, dtype=np.int32), True)
        after = generation.response(0.0)
        for field in ("output_tokens", "output_logprobs", "output_versions"):
            np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
        assert (generation.count, generation.server, after.segments) == (4, A, before.segments)
        assert not generation.finished
        generation.take(B, segment, answer(4), np.full(4, 3, dtype=np.int32), True)
        assert generation.finished


async def test_no_token_is_older_than_what_its_rollout_allows() -> None:
    async with leased(3, labelled=True) as (_, lease):
        generation = Generation(ModelRequest([1]), "r", 8, Origin(None, 4))
        segment = generation.next_segment(RolloutConfig(servers=[A]), lease)
        with pytest.raises(ProtocolError, match="below 4"):
            generation.take(A, segment, answer(1), np.full(1, 3, dtype=np.int32), True)
        assert generation.count == 0
