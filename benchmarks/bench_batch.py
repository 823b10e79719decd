"""What does it cost to make a trainer's arrays out of a batch of ragged rows?

Two baselines in the same run: ``numpy.pad`` on each row and one ``concatenate`` a column, which is
what AReaL does with tensors; and a copy of as many bytes into memory that was touched before, the
yardstick of any assembly. Targets: ``padded`` into buffers used again takes at most 1/4 of the
first, and at most the second where the data outweighs looking at 4,096 arrays.

    pytest benchmarks/bench_batch.py --benchmark-columns=median,min,max --benchmark-sort=name

``test_targets`` prints the ratios (``-s``) and fails where one misses its target; it measures the
candidates in turn, round after round, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from arealtrio.trajectory import COLUMNS, Batch, CollateBuffers, Group
from arealtrio.types import Trajectory

ROWS = 1024
GROUP_SIZE = 8
ROUNDS = 7
FILLS = {"input_ids": 0, "loss_mask": 0, "logprobs": 0.0, "versions": -1}

Arrays = dict[str, npt.NDArray[Any]]


def ragged(longest: int) -> Batch:
    """1,024 rows in groups of 8 that fill a third of the rectangle: few are long, many short."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(longest / 4), 0.8, ROWS).astype(int), 1, longest)
    lengths[0] = longest
    rows = [a_row(int(length)) for length in lengths]
    groups = [
        Group.of(
            [[row] for row in rows[start : start + GROUP_SIZE]],
            number=start,
            permit_version=0,
            prompt_id=str(start),
            task_id=str(start),
        )
        for start in range(0, ROWS, GROUP_SIZE)
    ]
    return Batch(groups=tuple(groups), version=1)


def a_row(length: int) -> Trajectory:
    return Trajectory(
        input_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.ones(length, dtype=np.int32),
        logprobs=np.full(length, -0.5, dtype=np.float32),
        versions=np.zeros(length, dtype=np.int32),
        reward=1.0,
    )


def pad_and_concatenate(batch: Batch) -> Arrays:
    """Each row of each column padded by itself, then put together."""
    width = max(map(len, batch.rows))
    out = {
        name: np.concatenate(
            [
                np.pad(getattr(row, name), (0, width - len(row)), constant_values=FILLS[name])[None]
                for row in batch.rows
            ]
        )
        for name, _ in COLUMNS
    }
    shown = [np.pad(np.ones(len(row), bool), (0, width - len(row)))[None] for row in batch.rows]
    return {**out, "attention_mask": np.concatenate(shown)}


def copy_into(target: Arrays, source: Arrays) -> None:
    for name, array in source.items():
        np.copyto(target[name], array)


@pytest.fixture(scope="module", params=[512, 4096, 16384], ids=lambda n: f"longest_{n}")
def batch(request: pytest.FixtureRequest) -> Batch:
    return ragged(request.param)


@pytest.fixture
def warm(batch: Batch) -> CollateBuffers:
    """Buffers whose every page has been touched, as after a training loop's first two steps."""
    buffers = CollateBuffers()
    for _ in range(buffers.size):
        batch.padded(buffers=buffers)
    return buffers


def test_padded_into_warm_buffers(
    benchmark: BenchmarkFixture, batch: Batch, warm: CollateBuffers
) -> None:
    arrays = benchmark(batch.padded, buffers=warm)
    assert arrays["attention_mask"].sum() == sum(map(len, batch.rows))


def test_padded_into_fresh_arrays(benchmark: BenchmarkFixture, batch: Batch) -> None:
    arrays = benchmark(batch.padded)
    assert arrays["attention_mask"].sum() == sum(map(len, batch.rows))


def test_packed_into_warm_buffers(benchmark: BenchmarkFixture, batch: Batch) -> None:
    buffers = CollateBuffers()
    for _ in range(buffers.size):
        batch.packed(buffers=buffers)
    arrays = benchmark(batch.packed, buffers=buffers)
    assert arrays["cu_seqlens"][-1] == sum(map(len, batch.rows))


def test_numpy_pad_and_concatenate(benchmark: BenchmarkFixture, batch: Batch) -> None:
    arrays = benchmark(pad_and_concatenate, batch)
    assert arrays["attention_mask"].sum() == sum(map(len, batch.rows))


def test_memcpy_of_the_same_bytes(benchmark: BenchmarkFixture, batch: Batch) -> None:
    source, target = batch.padded(), batch.padded()
    copy_into(target, source)
    benchmark(copy_into, target, source)
    assert target["input_ids"][0, -1] == source["input_ids"][0, -1]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize(("longest", "memcpy_ratio"), [(512, None), (4096, None), (16384, 1.0)])
def test_targets(longest: int, memcpy_ratio: float | None) -> None:
    batch = ragged(longest)
    buffers = CollateBuffers()
    source, target = batch.padded(buffers=buffers), batch.padded(buffers=buffers)
    expected = pad_and_concatenate(batch)
    assert all(np.array_equal(source[name], expected[name]) for name in expected)
    source = {name: source[name].copy() for name in expected}
    target = {name: target[name].copy() for name in expected}
    del expected
    candidates: dict[str, Callable[[], object]] = {
        "padded": lambda: batch.padded(buffers=buffers),
        "numpy": lambda: pad_and_concatenate(batch),
        "memcpy": lambda: copy_into(target, source),
    }
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            taken[name].append(seconds(call))
    median = {name: statistics.median(times) for name, times in taken.items()}
    to_numpy = median["padded"] / median["numpy"]
    to_memcpy = median["padded"] / median["memcpy"]
    size_mb = sum(array.nbytes for array in source.values()) / 1e6
    print(
        f"\nlongest {longest}: {size_mb:.0f} MB, padded {median['padded'] * 1e3:.2f} ms, "
        f"{to_numpy:.3f} of numpy.pad + concatenate, {to_memcpy:.2f} of memcpy"
    )
    assert to_numpy <= 1 / 4
    assert memcpy_ratio is None or to_memcpy <= memcpy_ratio
