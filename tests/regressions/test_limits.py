"""AReaL's defects E31 to E35: what has no bound, and what is one value for many things."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.errors import RequestRejected, UsageError
from arealtrio.testing import FixedLengths, simulated_executor
from arealtrio.types import ModelRequest, Outcome

from ..unit.faulty import faulty_engine, refuses
from ..unit.puppet import Generates, Instant, Prompt, Puppet, prompts, settled

Clock = trio.testing.MockClock


async def test_e31_nothing_is_queued_or_kept_without_bound(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2, queue_size=4) as (executor, _):
        puppet = Puppet()
        executor.pause()
        for prompt in prompts(4):
            executor.submit(prompt, puppet)
        with pytest.raises(UsageError, match="queue_size"):
            executor.submit({}, puppet)
        executor.resume()
        for version in range(1, 30):
            await settled()
            puppet.end_all()
            for result in await executor.wait(2):
                executor.submit({}, puppet, task_id=result.task_id)
            await executor.set_version(version)
        assert len(executor._live) == 4
        assert len(executor._results.of(is_eval=False)) == 0
        assert not executor._results._held
        assert not executor._results._claimed


async def test_e32_a_dead_server_is_left(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=2, lengths=FixedLengths(50), consumer_batch_size=8) as (
        executor,
        fleet,
    ):
        for prompt in prompts(8):
            executor.submit(prompt, Generates())
        await trio.sleep(0.2)
        fleet.servers[0].die()
        results = await executor.wait(8)
        assert {result.outcome for result in results} == {Outcome.ACCEPTED}


async def test_e34_five_ends_are_five_outcomes(autojump_clock: Clock) -> None:
    def decide(data: Prompt) -> Any:
        if data["prompt_id"] == "failed":
            raise ValueError
        return None if data["prompt_id"] == "rejected" else "accept"

    class Mixed(Instant):
        async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
            if data["prompt_id"] in ("expired", "cancelled"):
                await trio.sleep_forever()
            return await super().arun_episode(engine, data)

    names = [outcome.value for outcome in Outcome]
    async with simulated_executor(servers=1, consumer_batch_size=8, rollout_timeout_s=5) as (
        executor,
        _,
    ):
        for name in names[:-1]:
            executor.submit({"prompt_id": name}, Mixed(decide), task_id=name)
        for name in names[:-1]:
            assert (await executor.wait_for_task(name)).outcome.value == name
        executor.submit({"prompt_id": "cancelled"}, Mixed(decide))
        await settled()
    assert names[-1] == "cancelled"
    assert {name: executor.counts.as_dict()[name] for name in names} == dict.fromkeys(names, 1)


async def test_e35_a_refused_request_is_sent_once_and_its_payload_is_in_no_message(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.asked.clear()
        faulty.fault = refuses("/inference/v1/generate")
        with pytest.raises(RequestRejected) as caught:
            await engine.agenerate(ModelRequest([271828] * 50))
        sent = [path for _, path in faulty.asked if "generate" in path]
        assert len(sent) == 1
        assert "271828" not in str(caught.value)
        assert all(row.outstanding == 0 for row in engine.statistics())
