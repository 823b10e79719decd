"""One generation's state: the names of its segments, and what each asks for."""

from __future__ import annotations

import pytest

from arealtrio.config import RolloutConfig
from arealtrio.generation import Generation
from arealtrio.ordering import Origin
from arealtrio.types import GenerationHyperparameters, ModelRequest

from .test_servers import A, pool_of

GCONFIG = GenerationHyperparameters(max_new_tokens=64, ignore_eos=True)


async def ids_of(rid: str, count: int) -> list[str]:
    """The ids that the first segments of a generation have on their servers."""
    pool, config = pool_of({A: 1}), RolloutConfig(servers=[A])
    generation = Generation(ModelRequest([1], GCONFIG), rid, 64, Origin(None, 0), None)
    with await pool.lease() as lease:
        return [generation.next_segment(config, lease).request_id for _ in range(count)]


@pytest.mark.parametrize("other", ["q", "q-0", "q-1", "q-10"])
async def test_no_id_begins_with_another_because_sglang_would_abort_both(other: str) -> None:
    ids = [*await ids_of("q", 12), *(await ids_of(other, 12) if other != "q" else [])]
    assert len(set(ids)) == len(ids)
    assert not [(a, b) for a in ids for b in ids if a != b and b.startswith(a)]


@pytest.mark.parametrize(("segment_tokens", "least"), [(4, 4), (20, 20), (30, 25), (None, 25)])
async def test_no_segment_asks_for_more_tokens_at_least_than_at_most(
    segment_tokens: int | None, least: int
) -> None:
    """The rest of min_new_tokens is for the segments that follow."""
    pool = pool_of({A: 1})
    config = RolloutConfig(servers=[A], segment_tokens=segment_tokens)
    gconfig = GenerationHyperparameters(max_new_tokens=64, min_new_tokens=25)
    generation = Generation(ModelRequest([1], gconfig), "q", 64, Origin(None, 0), None)
    with await pool.lease() as lease:
        segment = generation.next_segment(config, lease)
    assert (segment.min_new_tokens, segment.max_new_tokens) == (least, segment_tokens or 64)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
async def test_each_segment_has_a_seed_of_its_own_whatever_the_first(seed: int) -> None:
    pool, config = pool_of({A: 1}), RolloutConfig(servers=[A])
    generation = Generation(
        ModelRequest([1], GCONFIG.new(seed=seed)), "q", 64, Origin(None, 0), None
    )
    with await pool.lease() as lease:
        seeds = [generation.next_segment(config, lease).seed for _ in range(5)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 5
    assert all(derived is not None and 0 <= derived < 2**31 for derived in seeds[1:])
