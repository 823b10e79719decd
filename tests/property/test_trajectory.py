"""Laws of a batch: its layouts agree, its rows come back, its ages add up, its memory lasts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.trajectory import Batch, CollateBuffers, Group, rows_from_result
from arealtrio.types import Trajectory

from ..models.collate import plain_mask, plain_pack, plain_pad

VERSION = 20  # the consuming one
PAD_ID = 99


def row(versions: list[int], reward: int = 0) -> Trajectory:
    """A row of these versions, -1 for its prompt; the rest of it follows from them."""
    made = np.array(versions) >= 0
    return Trajectory(
        input_ids=np.array(versions, dtype=np.int32) + len(versions) + 1,
        loss_mask=made.astype(np.int32),
        logprobs=np.where(made, -0.5, 0.0),
        versions=np.array(versions),
        reward=reward,
        extras={"values": np.arange(len(versions), dtype=np.float32)},
    )


def group(*members: list[Trajectory]) -> Group:
    return Group.of(members, number=0, permit_version=0, prompt_id="p", task_id="t")


VERSIONS = st.lists(st.integers(-1, VERSION), min_size=1, max_size=9)
ROWS = st.builds(row, VERSIONS, st.integers(-3, 3))
GROUPS = st.lists(st.lists(ROWS, max_size=2), min_size=1, max_size=3).filter(any)
BATCHES = st.lists(GROUPS, max_size=3).map(
    lambda made: Batch(groups=tuple(group(*members) for members in made), version=VERSION)
)


def fields(row: Trajectory) -> dict[str, list[Any]]:
    return {
        "input_ids": row.input_ids.tolist(),
        "loss_mask": row.loss_mask.tolist(),
        "logprobs": row.logprobs.tolist(),
        "versions": row.versions.tolist(),
        **{name: extra.tolist() for name, extra in row.extras.items()},
    }


@given(BATCHES)
def test_both_layouts_are_the_models(batch: Batch) -> None:
    listed = [fields(row) for row in batch.rows]
    width = max(map(len, batch.rows), default=0)
    padded, packed = batch.padded(PAD_ID), batch.packed()
    fills = {"input_ids": PAD_ID, "loss_mask": 0, "logprobs": 0.0, "versions": -1, "values": 0.0}
    for name, fill in fills.items():
        if listed or name != "values":  # nobody says which extras an empty batch has
            vectors = [row[name] for row in listed]
            assert padded[name].tolist() == plain_pad(vectors, fill, width)
            assert (packed[name].tolist(), packed["cu_seqlens"].tolist()) == plain_pack(vectors)
    assert padded["attention_mask"].tolist() == plain_mask([r["versions"] for r in listed], width)
    assert packed["max_seqlen"] == width
    for arrays in (padded, packed):
        assert arrays["rewards"].tolist() == [row.reward for row in batch.rows]
        whose = [i for i, group in enumerate(batch.groups) for _ in group.rows]
        assert arrays["group_ids"].tolist() == whose


@given(BATCHES.filter(len))
def test_rows_come_back_out_of_the_padded_arrays(batch: Batch) -> None:
    arrays = batch.padded(PAD_ID)
    del arrays["group_ids"]
    returned = rows_from_result(arrays)
    assert [fields(row) for row in returned] == [fields(row) for row in batch.rows]
    assert [row.reward for row in returned] == [row.reward for row in batch.rows]


@given(BATCHES)
def test_ages_add_up(batch: Batch) -> None:
    made = [[v for v in row.versions.tolist() if v >= 0] for row in batch.rows]
    oldest = [VERSION - min(versions) if versions else 0 for versions in made]
    assert batch.staleness().tolist() == oldest
    assert batch.staleness_histogram(of="trajectories") == Counter(oldest)
    assert batch.staleness_histogram() == Counter(VERSION - v for vs in made for v in vs)
    assert list(batch.staleness_histogram()) == sorted(batch.staleness_histogram())
    assert batch.mixed_version_trajectories() == sum(len(set(vs)) > 1 for vs in made)
    for group in batch.groups:
        versions = [v for row in group.rows for v in row.versions.tolist() if v >= 0]
        assert group.head_version == min(versions, default=None)
        assert group.tail_version == max(versions, default=None)


def listed(arrays: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(st.integers(1, 3), st.lists(st.tuples(LENGTHS, st.booleans()), max_size=6))
def test_buffers_keep_the_last_batches_whole(
    size: int, steps: list[tuple[list[int], bool]]
) -> None:
    ring = CollateBuffers(size)
    made: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for step, (lengths, pack) in enumerate(steps):
        batch = Batch(groups=(group([row([step] * n) for n in lengths]),), version=VERSION)
        arrays = batch.packed(buffers=ring) if pack else batch.padded(PAD_ID, buffers=ring)
        fresh = batch.packed() if pack else batch.padded(PAD_ID)
        made.append((arrays, listed(fresh)))
        for lasting, expected in made[-size:]:
            assert listed(lasting) == expected
