"""One generation's state: the names of its segments."""

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
