"""A run follows from its seed alone: exchanges, faults and results, in any process."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio

from arealtrio import (
    GenerationHyperparameters,
    RolloutError,
    SingleTurnWorkflow,
    TooManyFailures,
    UsageError,
    WeightUpdate,
    WeightUpdateError,
)
from arealtrio.testing import (
    Faults,
    LogNormalLengths,
    SimulatedServerSettings,
    checkpoint,
    repeatable_schedule,
    run_virtually,
    simulated_executor,
)

LENGTHS = LogNormalLengths.with_tail(median=10, p99=90, longest=200)


def prompts() -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {"prompt_id": number, "input_ids": [1, 2, 3 + number % 100]}


async def trained(dialect: Any, seed: int, streaming: bool) -> list[object]:
    """Train for a while while everything goes wrong; return all that could be seen of it."""
    workflow = SingleTurnWorkflow(
        lambda *_, **__: 1.0, GenerationHyperparameters(max_new_tokens=500)
    )
    rates = {**Faults.all(0).rates}
    faults = Faults(seed, {kind: 5 * rate if rate < 0.1 else rate for kind, rate in rates.items()})
    settings = SimulatedServerSettings(max_num_seqs=4, dialect=dialect)
    seen: list[object] = []
    async with simulated_executor(
        servers=[settings] * 4, lengths=LENGTHS, seed=seed, faults=faults, traced=True,
        consumer_batch_size=4, max_concurrent_rollouts=16, max_staleness=2,
        streaming=streaming, segment_timeout_s=60.0, idle_timeout_s=20.0, max_failovers=50,
        probe_interval_s=1.0, health_interval_s=5.0, update_timeout_s=20.0,
        max_failure_ratio=1.0, max_consecutive_failures=1000,
    ) as (executor, fleet):  # fmt: skip
        loader = prompts()
        for _ in range(6):
            with suppress(TooManyFailures):
                batch = await executor.prepare_batch(loader, workflow)
                seen += [(row.input_ids.tolist(), row.versions.tolist()) for row in batch.rows]
            await trio.sleep(2)
            version = executor.get_version() + 1
            while executor.get_version() < version:
                with suppress(WeightUpdateError, RolloutError):
                    update = WeightUpdate.from_disk(checkpoint(version), version)
                    await executor.update_weights(update)
                await trio.sleep(1)
    return [*seen, *fleet.trace, *fleet.faults.log]


CASES = [("vllm", 1, False), ("sglang", 2, False), ("vllm", 3, True), ("sglang", 4, True)]


def history(case: tuple[str, int, bool]) -> list[object]:
    return run_virtually(trained, *case, seed=case[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_seed_gives_the_same_run(case: tuple[str, int, bool]) -> None:
    first, again = history(case), history(case)
    assert first == again
    assert any(type(one).__name__ == "Fault" for one in first)


def test_another_seed_gives_another_run() -> None:
    assert history(("vllm", 1, False)) != history(("vllm", 2, False))


def test_the_same_seed_gives_the_same_run_in_another_process() -> None:
    """Addresses of objects and the seed of string hashes differ there."""
    said = [
        subprocess.run(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for hash_seed in ("1", "4711")
    ]
    assert said[0] == said[1]
    assert len(said[0]) > 10_000


# --- the runner ------------------------------------------------------------------------------


def test_a_failure_says_how_to_repeat_it() -> None:
    async def fail() -> None:
        await trio.sleep(3600)
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        run_virtually(fail, seed=7)
    (note,) = caught.value.__notes__
    assert note.startswith("seed=7; repeat with run_virtually(")
    assert note.endswith("fail, …, seed=7)")


def test_a_deadlock_ends() -> None:
    with pytest.raises(trio.TooSlowError):
        run_virtually(trio.sleep_forever, time_limit_s=50.0)


def test_the_seed_orders_the_tasks() -> None:
    async def order() -> list[int]:
        seen: list[int] = []

        async def note(number: int) -> None:
            await trio.lowlevel.checkpoint()
            seen.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(note, number)
        return seen

    orders = {tuple(run_virtually(order, seed=seed)) for seed in (1, 2, 3, 1, 2, 3)}
    assert len(orders) == 3


def test_the_schedule_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trio._core._run
    before = run._r
    with repeatable_schedule(1):
        assert run._r is not before
    assert run._r is before
    monkeypatch.delattr(run, "_r")
    with pytest.raises(UsageError, match="can not be repeated"), repeatable_schedule(1):
        pass


if __name__ == "__main__":
    for case in CASES[1:3]:
        for line in history(case):
            print(line)  # noqa: T201


@pytest.mark.parametrize(("mine", "during"), [(700, 50_000), (90_000, 90_000), (0, 0)])
def test_cycles_are_looked_for_less_often_and_afterwards_as_before(mine: int, during: int) -> None:
    before = gc.get_threshold()

    async def fail() -> None:
        assert gc.get_threshold() == (during, 9, 8)
        raise RuntimeError("mine")

    gc.set_threshold(mine, 9, 8)
    try:
        with pytest.raises(RuntimeError, match="mine"):
            run_virtually(fail)
        assert gc.get_threshold() == (mine, 9, 8)
    finally:
        gc.set_threshold(*before)
