"""Servers that die, refuse weights or change them under load: nothing is lost, nothing mixed."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.servers import ServerState
from arealtrio.transport import HttpTransport
from arealtrio.types import GenerationHyperparameters, ModelRequest, ModelResponse
from arealtrio.weights import WeightUpdate, update_weights

from .recorder import Recorder
from .server import CAP, VllmServer
from .until import until

pytestmark = pytest.mark.real_servers

SEGMENT_TOKENS = 256
LENGTH = 600
GENERATIONS = 64
PROVING_LIMIT_S = 120.0  # for a server that came back to have all its slots again
RESTART_LIMIT_S = 180.0
GREEDY = GenerationHyperparameters(greedy=True, ignore_eos=True, max_new_tokens=LENGTH)


def prompt(number: int) -> list[int]:
    return [5 + number % 300, 17, 99, 200 + number % 100]


@asynccontextmanager
async def recorded_engine(
    servers: Sequence[VllmServer], **changes: Any
) -> AsyncIterator[tuple[RemoteEngine, Recorder]]:
    recorder = Recorder(HttpTransport())
    given = {"probe_interval_max_s": 2.0, "segment_tokens": SEGMENT_TOKENS, **changes}
    try:
        config = RolloutConfig(servers=[server.url for server in servers], **given)
        async with open_engine(config, transport=recorder) as engine:
            yield engine, recorder
    finally:
        with trio.CancelScope(shield=True):
            await recorder.aclose()


class Generations:
    """Many at once, and their answers by number."""

    def __init__(self, engine: RemoteEngine, gconfig: GenerationHyperparameters = GREEDY) -> None:
        self.engine = engine
        self.gconfig = gconfig
        self.answers: dict[int, ModelResponse] = {}
        self.enough = False

    async def run(self, numbers: Sequence[int]) -> None:
        async with trio.open_nursery() as nursery:
            for number in numbers:
                nursery.start_soon(self._one, number)

    async def load(self, width: int) -> None:
        """Keep ``width`` under way, however fast the servers are, until ``enough`` is set."""
        numbers = itertools.count()

        async def one_after_the_other() -> None:
            while not self.enough:
                await self._one(next(numbers))

        async with trio.open_nursery() as nursery:
            for _ in range(width):
                nursery.start_soon(one_after_the_other)

    async def _one(self, number: int) -> None:
        request = ModelRequest(prompt(number), self.gconfig, rid=f"generation-{number}")
        self.answers[number] = await self.engine.agenerate(request)


def states(engine: RemoteEngine) -> list[str]:
    return [row.state for row in engine.statistics()]


async def until_states(engine: RemoteEngine, *wanted: str, limit_s: float = 30.0) -> None:
    with trio.fail_after(limit_s):
        while states(engine) != list(wanted):
            await engine.pool.service_changed.wait()


def running(server: VllmServer) -> int:
    return int(server.metrics()["vllm:num_requests_running"])


async def until_all_run(servers: Sequence[VllmServer]) -> None:
    await until(lambda: [running(s) for s in servers] == [CAP] * len(servers), "all are full")


async def until_loaded(recorder: Recorder, servers: Sequence[VllmServer]) -> None:
    """Each has answered as many segments as it runs at once, and been asked for as many more."""
    await recorder.until(lambda: all(recorder.answered.get(s.url, 0) >= CAP for s in servers))


def check_whole(answers: dict[int, ModelResponse], recorder: Recorder, count: int) -> None:
    """Every generation ended, with exactly the tokens and versions that the servers gave it."""
    assert sorted(answers) == list(range(count))
    for answer in answers.values():
        assert answer.output_len == len(answer.output_logprobs) == len(answer.output_versions)
        assert answer.output_len == LENGTH
        assert answer.output_tokens.tolist() == recorder.tokens_told(answer.rid)
        assert answer.output_versions.tolist() == recorder.versions_told(answer.rid)
        assert answer.versions_exact
        assert np.all(np.diff(answer.output_versions) >= 0)


async def test_a_server_killed_under_load_loses_no_generation_and_comes_back(
    vllm_servers: Sequence[VllmServer],
) -> None:
    victim, survivor = vllm_servers
    new_weights = WeightUpdate.from_disk(survivor.models / "tiny-2", 1)
    async with recorded_engine(vllm_servers) as (engine, recorder):
        generations = Generations(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generations.run, range(GENERATIONS))
            await trio.testing.wait_all_tasks_blocked()
            assert [row.outstanding for row in engine.statistics()] == [CAP, CAP]
            assert engine.pool.waiting == GENERATIONS - 2 * CAP
            # In the turn in which it is asked to go on with half of its long ones: they run.
            await recorder.until(lambda: recorder.asked[victim.url] >= CAP + CAP // 2)
            assert not generations.answers
            victim.kill()
            await until_states(engine, "ejected", "ready")
            victim.start_again()  # in this thread: a server ends with the thread that started it
        check_whole(generations.answers, recorder, GENERATIONS)
        check_what_was_made_again(engine, generations.answers)
        await check_greedy(survivor, generations.answers)

        result = await update_weights(engine.pool, new_weights)
        assert result.updated == (survivor.url,)
        await engine.pool.wait_ready(RESTART_LIMIT_S)
        assert [row.version for row in engine.statistics()] == [
            1,
            1,
        ]  # tiny-1 is what it began with
        before = recorder.asked[victim.url]
        with trio.fail_after(PROVING_LIMIT_S):  # slow start: a slot more for each that goes well
            while engine.statistics()[0].allowed < CAP:
                again = Generations(engine)
                await again.run(range(2 * CAP))
                check_whole(again.answers, recorder_since(recorder, again), 2 * CAP)
        assert recorder.asked[victim.url] >= before + CAP - 1
        assert {v for a in again.answers.values() for v in a.output_versions.tolist()} == {1}
    await check_greedy(victim, again.answers)


def recorder_since(recorder: Recorder, generations: Generations) -> Recorder:
    """Ids are used twice, so that a number names its prompt; keep the answers to the last."""
    for answer in generations.answers.values():
        told = recorder.choices[answer.rid]
        keep = range(len(answer.segments))
        recorder.choices[answer.rid] = {n: told[n] for n in keep}
    return recorder


def check_what_was_made_again(engine: RemoteEngine, answers: dict[int, ModelResponse]) -> None:
    """A segment that was lost had at most ``segment_tokens``; whole ones before it were kept."""
    assert 1 <= engine.totals().failovers <= 2 * CAP
    victim = engine.statistics()[0]
    assert victim.ejections == 1
    assert victim.failovers >= CAP // 2  # what ran there, unless its answer was on the way
    for answer in answers.values():
        lengths = [segment.end - segment.start for segment in answer.segments]
        assert lengths == [SEGMENT_TOKENS, SEGMENT_TOKENS, LENGTH - 2 * SEGMENT_TOKENS]


async def check_greedy(server: VllmServer, answers: dict[int, ModelResponse]) -> None:
    """What a server gives that is asked directly, and nobody disturbs, for some of them.

    Sums in floating point depend on what else is in a batch, so it is the tokens' probabilities
    under the weights that are held to, not the tokens.
    """
    for number in (0, len(answers) // 2, len(answers) - 1):
        answer = answers[number]
        ids = [*answer.input_tokens.tolist(), *answer.output_tokens.tolist()]
        scores = await trio.to_thread.run_sync(server.score, ids)
        made = scores[len(answer.input_tokens) - 1 :]
        thought = np.array([score.logprob for score in made])
        np.testing.assert_allclose(answer.output_logprobs, thought, rtol=0, atol=1e-4)
        assert all(score.logprob >= score.best - 1e-4 for score in made)


async def test_cancelled_generations_are_gone_from_the_servers_half_a_second_later(
    vllm_servers: Sequence[VllmServer],
) -> None:
    endless = GREEDY.new(max_new_tokens=12000)
    async with recorded_engine(vllm_servers, segment_tokens=None) as (engine, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Generations(engine, endless).load, 2 * CAP)
            await until_all_run(vllm_servers)
            nursery.cancel_scope.cancel()
        with trio.move_on_after(0.5):
            await trio.sleep_forever()
        left = [await trio.to_thread.run_sync(server.in_flight) for server in vllm_servers]
        assert left == [0, 0]
        assert [row.outstanding for row in engine.statistics()] == [0, 0]
        assert engine.pool.waiting == 0


async def test_a_server_that_fails_an_update_is_named_and_out_until_it_has_the_weights(
    vllm_servers: Sequence[VllmServer],
) -> None:
    """The checkpoint's directory is missing on one of them, and vLLM is poisoned by that."""
    broken, sound = vllm_servers
    name = "checkpoint-of-version-1"
    (sound.folder / name).symlink_to(sound.models / "tiny-2", target_is_directory=True)
    async with recorded_engine(vllm_servers) as (engine, recorder):
        generations = Generations(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generations.load, GENERATIONS // 2)
            await until_loaded(recorder, vllm_servers)
            result = await update_weights(engine.pool, WeightUpdate.from_disk(name, 1))
            generations.enough = True
            assert result.updated == (sound.url,)
            assert list(result.failed) == [broken.url]
            assert engine.get_version() == 1
            assert states(engine) == ["stale", "ready"]
            asked = recorder.asked[broken.url]
        check_whole(generations.answers, recorder, len(generations.answers))
        assert recorder.asked[broken.url] == asked  # no traffic since
        assert await trio.to_thread.run_sync(lambda: broken.alive)  # nor was it asked to generate
        assert states(engine) == ["stale", "ready"]

        (broken.folder / name).symlink_to(broken.models / "tiny-2", target_is_directory=True)
        await engine.pool.wait_ready(60.0)
        again = Generations(engine, GREEDY.new(max_new_tokens=64))
        await again.run(range(2 * CAP))
        assert recorder.asked[broken.url] >= asked + CAP
        assert {v for a in again.answers.values() for v in a.output_versions.tolist()} == {1}
        for server in vllm_servers:
            await trio.Path(server.folder / name).unlink()
    await check_greedy(broken, again.answers)


async def test_a_rolling_update_under_load_fails_nothing_and_leaves_always_one_ready(
    vllm_servers: Sequence[VllmServer],
) -> None:
    path = vllm_servers[0].models / "tiny-2"
    async with recorded_engine(vllm_servers) as (engine, recorder):
        generations = Generations(engine)
        seen: set[tuple[str, ...]] = set()

        async def watch() -> None:
            while True:
                seen.add(tuple(states(engine)))
                await engine.pool.service_changed.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            async with trio.open_nursery() as load:
                load.start_soon(generations.load, GENERATIONS // 2)
                await until_loaded(recorder, vllm_servers)
                result = await update_weights(
                    engine.pool, WeightUpdate.from_disk(path, 1, rolling=True)
                )
                generations.enough = True
            nursery.cancel_scope.cancel()
        assert sorted(result.updated) == sorted(s.url for s in vllm_servers)
        assert result.failed == {}
        check_whole(generations.answers, recorder, len(generations.answers))
        ready = ServerState.READY.value
        assert seen == {(ready, ready), ("paused", ready), (ready, "paused")}
        mixed = [a for a in generations.answers.values() if len(set(a.output_versions)) > 1]
        assert mixed  # else the update met nobody
        assert engine.totals().failovers == 0
