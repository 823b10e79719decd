"""Why am I waiting: each stage, each thing that blocks admission, the table, and the log."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.status import AdmissionStatus, ExecutorStatus, MemberStatus, Stage
from arealtrio.testing import FixedLengths, SimulatedServerSettings, simulated_executor

from .puppet import Deferred, Generates, Puppet, prompt_list, prompts, settled

Clock = trio.testing.MockClock
FREE = AdmissionStatus(
    queued=3,
    running_members=1,
    concurrency=2,
    staleness_capacity=4,
    version=7,
    paused=False,
    servers_in_service=1,
)
WAITING = MemberStatus(
    task_id="rollout-8",
    prompt_id="p",
    member_index=3,
    is_eval=True,
    stage=Stage.WAITING,
    age_s=123456.7,
    tokens=123456,
)
ONE_SLOT = [SimulatedServerSettings(max_num_seqs=1, token_time_s=0.1)]


class Lingers(Puppet):
    """Takes a second to leave when it is cancelled."""

    async def arun_episode(self, engine: Any, data: Any, /) -> Any:
        try:
            return await super().arun_episode(engine, data)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)


async def test_each_rollout_says_what_it_does(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=ONE_SLOT,
        lengths=FixedLengths(100),
        consumer_batch_size=8,
        max_concurrent_rollouts=4,
        rollout_timeout_s=5,
    ) as (executor, _):
        generates, lingers = Generates(), Lingers()
        for number, prompt in enumerate(prompt_list(2)):
            executor.submit(prompt, generates, task_id=f"generates-{number}")
        executor.submit({"prompt_id": "w"}, Puppet(), task_id="works", is_eval=True)
        executor.submit({"prompt_id": "l"}, lingers, task_id="lingers", group_size=2)
        await trio.sleep(2)
        found = {(m.task_id, m.member_index): m for m in executor.status().members}
        busy = found["generates-0", 0]
        other = found["generates-1", 0]
        assert {busy.stage, other.stage} == {Stage.GENERATING, Stage.WAITING}
        if busy.stage is Stage.WAITING:
            busy, other = other, busy
        assert busy.server == executor.engine.statistics()[0].address
        assert (busy.version, busy.age_s, other.server) == (0, 2.0, None)
        assert found["works", 0].stage is Stage.WORKFLOW
        assert found["works", 0].is_eval
        assert found["lingers", 0].stage is Stage.WORKFLOW
        assert found["lingers", 1].stage is Stage.QUEUED  # there are four slots
        await trio.sleep(3.5)
        late = {(m.task_id, m.member_index): m for m in executor.status().members}
        assert late["lingers", 0].stage is Stage.SETTLING
        assert 5.4 < late["lingers", 0].age_s < 5.6


async def test_tokens_count_over_segments_and_over_requests(autojump_clock: Clock) -> None:
    class Twice(Generates):
        async def arun_episode(self, engine: Any, data: Any, /) -> Any:
            await super().arun_episode(engine, data)
            await super().arun_episode(engine, data)
            await trio.sleep_forever()

    async with simulated_executor(
        servers=ONE_SLOT, lengths=FixedLengths(100), segment_tokens=20
    ) as (
        executor,
        _,
    ):
        executor.submit(prompt_list(1)[0], Twice())
        await trio.sleep(5)
        (member,) = executor.status().members
        assert member.tokens == 40
        await trio.sleep(100)
        (member,) = executor.status().members
        assert (member.tokens, member.stage) == (200, Stage.WORKFLOW)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"queued": 0}, "queue empty"),
        ({"running_members": 2}, "concurrency: 2 of 2"),
        ({"staleness_capacity": -2}, "staleness: short by 3 at version 7"),
        ({"paused": True}, "paused"),
        ({"recovering": True}, "recovering"),
        ({"servers_in_service": 0}, "no server"),
    ],
)
def test_what_blocks_admission_is_named(change: dict[str, Any], words: str) -> None:
    blocked_by = dataclasses.replace(FREE, **change).blocked_by
    assert len(blocked_by) == bool(change)
    assert all(block.startswith(words) for block in blocked_by)


async def test_what_blocks_is_read_from_the_executor(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2, max_concurrent_rollouts=9) as (
        executor,
        _,
    ):
        assert "queue empty" in executor.status().admission.blocked_by[0]
        puppet = Puppet()
        for prompt in prompts(3):
            executor.submit(prompt, puppet)
        executor.pause()
        admission = executor.status().admission
        assert (admission.queued, admission.running_members, admission.paused) == (1, 2, True)
        assert admission.staleness_capacity == 0
        assert len(admission.blocked_by) == 2


def generating(number: int, server: str, task_id: str = "rollout-7") -> MemberStatus:
    return MemberStatus(
        task_id=task_id,
        prompt_id="p",
        member_index=number,
        is_eval=bool(number % 2),
        stage=Stage.GENERATING,
        server=server,
        version=12,
        age_s=3456.7 - number,
        tokens=123456,
    )


def table_of(members: Sequence[MemberStatus], admission: AdmissionStatus = FREE) -> list[str]:
    table = ExecutorStatus(members=tuple(members), admission=admission, quiet_s=12.3)
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def words_of(lines: list[str]) -> str:
    """The table as if it had one endless line."""
    return " ".join(" ".join(lines).split())


def test_the_table_lists_the_oldest_and_counts_the_others() -> None:
    lines = table_of([dataclasses.replace(WAITING, member_index=n) for n in range(50)])
    assert lines[0] == "50 rollouts: 50 waiting for a server"
    assert lines[1] == "nothing settled for 12.3 s"
    assert sum("123456.7" in line for line in lines) == 40
    assert lines[-1] == "… and 10 younger ones"


def test_a_line_of_the_table_tells_one_server_from_another() -> None:
    lines = table_of([generating(n, f"http://10.0.0.12:{8000 + n}") for n in range(2)])
    assert lines[-2:] == [
        "rollout-7[0]      3456.7 123456 generating on 10.0.0.12:8000 (v12)",
        "rollout-7[1] eval 3455.7 123456 generating on 10.0.0.12:8001 (v12)",
    ]


@pytest.mark.parametrize("host", ["[2001:db8::ff00:42:8329]", "gen-7.inference.svc.cluster.local"])
@pytest.mark.parametrize("task_id", ["rollout-7", "9f1b7c52-6f0e-4c1e-9d62-0f3a5b8f2d11"])
def test_a_long_name_takes_another_line_and_is_not_cut(host: str, task_id: str) -> None:
    lines = table_of([generating(7, f"http://{host}:30000", task_id), WAITING])
    table = words_of(lines)
    assert f"{task_id}[7] eval 3449.7 123456 generating on {host}:30000 (v12)" in table
    assert "waiting for a server" in table


def test_a_name_longer_than_a_line_is_broken() -> None:
    young = dataclasses.replace(WAITING, age_s=1.0)
    lines = table_of([generating(0, f"http://{'h' * 200}:8000", "t" * 200), young])
    table = "".join(words_of(lines).split())
    assert f"{'t' * 200}[0]3456.7123456generatingon{'h' * 200}:8000(v12)" in table
    assert lines[-1].endswith("waiting for a server")  # the others stay in one line


def test_all_that_blocks_and_every_stage_is_told_to_its_end() -> None:
    members = [dataclasses.replace(WAITING, stage=stage) for stage in Stage for _ in range(1234)]
    table = words_of(table_of(members, dataclasses.replace(FREE, queued=0, paused=True)))
    assert ", ".join(f"1234 {stage.value}" for stage in Stage) in table
    assert "submitted or read that has not started admission is blocked by paused" in table


def test_what_there_is_none_of_is_left_out() -> None:
    assert table_of([])[0] == "0 rollouts"
    assert table_of([WAITING])[0] == "1 rollout: 1 waiting for a server"


def stalls(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "nothing settled" in r.getMessage()]


async def test_a_stall_is_logged_with_the_table_and_settlements_put_it_off(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "arealtrio")
    async with simulated_executor(servers=1, consumer_batch_size=9, stall_warning_s=10) as (
        executor,
        _,
    ):
        await trio.sleep(100)
        assert not stalls(caplog)  # idle is not stalled
        puppet = Puppet()
        for prompt in prompts(3):
            executor.submit(prompt, puppet)
        for number in range(2):
            await trio.sleep(9)
            puppet.end(number)
            await settled()
        assert not stalls(caplog)
        await trio.sleep(11)
        (words,) = stalls(caplog)
        assert words.startswith("nothing settled for 10 s\n1 rollout: ")
        assert "rollout-2[0]" in words
        await trio.sleep(10)
        assert len(stalls(caplog)) == 2  # and again
        assert 20 < executor.status().quiet_s < 22
        puppet.end(2)
        await executor.wait(3)
        assert executor.status().quiet_s == 0
        await trio.sleep(100)
        assert len(stalls(caplog)) == 2
    assert {record.name.partition(".")[0] for record in caplog.records} == {"arealtrio"}


async def test_what_is_queued_again_once_all_had_settled_stalls_too(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "arealtrio")
    async with (
        trio.open_nursery() as nursery,
        simulated_executor(
            servers=1,
            consumer_batch_size=1,
            max_staleness=0,
            straggler_policy="requeue",
            stall_warning_s=10,
        ) as (executor, _),
    ):
        puppet, loader = Puppet(), prompt_list(2)
        call = Deferred(nursery, executor.prepare_batch, loader, puppet)
        for number in range(2):
            await settled()
            puppet.end(number)
            await settled()
            await executor.set_version(number + 1)
        assert call.value is not None
        await executor.set_version(3)  # the second was made in version 1, and nobody took it
        await settled()
        assert [rollout.prompt_id for rollout in puppet.running] == [1]
        await trio.sleep(11)
        assert len(stalls(caplog)) == 1


async def test_it_counts_by_stage(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery, simulated_executor(servers=1) as (executor, _):
        call = Deferred(nursery, executor.prepare_batch, prompts(), Puppet())
        await settled()
        assert executor.status().count(Stage.WORKFLOW) == 1
        assert "1 in the workflow" in str(executor.status())
        call.scope.cancel()
