"""Servers that die, refuse, lie and hang, over real sockets: every generation ends, and exactly."""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
import trustme

from arealtrio.config import RolloutConfig
from arealtrio.embedded.model import TinyModel
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import NoServerAvailable, UsageError
from arealtrio.transport import HttpTransport
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
    ModelResponse,
)
from arealtrio.weights import WeightUpdate, update_weights

from .embedded_server import VOCAB_SIZE, save_weights
from .fleet import Fleet, connected_engine
from .observed import observed_engine
from .scripted_server import Answer, at_once, http, never, scripted_server
from .server_process import two_processes

DIALECTS = ("vllm", "sglang")
CAP = 8
LENGTH = 60
SEGMENT_TOKENS = 16
GENERATIONS = 64
GREEDY = GenerationHyperparameters(greedy=True, max_new_tokens=LENGTH, ignore_eos=True)
QUICK: dict[str, Any] = {
    "probe_interval_s": 0.05,
    "probe_interval_max_s": 0.2,
    "failover_interval_s": 0.01,
    "vocab_size": VOCAB_SIZE,
}

NO_RETURN = {"probe_interval_s": 60.0, "probe_interval_max_s": 60.0}


class Generations:
    """Many at once, and their answers."""

    def __init__(self, engine: RemoteEngine, gconfig: GenerationHyperparameters = GREEDY) -> None:
        self.engine = engine
        self.gconfig = gconfig
        self.answers: list[ModelResponse] = []

    async def run(self, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self._one, [5 + number, 17, 99])

    async def _one(self, prompt: list[int]) -> None:
        self.answers.append(await self.engine.agenerate(ModelRequest(prompt, self.gconfig)))


def check_exact(answers: list[ModelResponse], weights: dict[int, Path], count: int) -> None:
    """All have ended, and each token is what the weights it names give after those before it."""
    assert len(answers) == count
    models = {version: TinyModel.load(path) for version, path in weights.items()}
    for answer in answers:
        assert answer.output_len == LENGTH
        assert answer.versions_exact
        assert np.all(np.diff(answer.output_versions) >= 0)
        whole = np.concatenate([answer.input_tokens, answer.output_tokens])
        for version, model in models.items():
            ours = answer.output_versions == version
            thought = model.logprobs(whole, answer.input_len)
            np.testing.assert_allclose(answer.output_logprobs[ours], thought[ours], atol=1e-4)
        assert set(answer.output_versions.tolist()) <= set(models)


def states(engine: RemoteEngine) -> list[str]:
    return [row.state for row in engine.statistics()]


async def until_states(engine: RemoteEngine, *wanted: str) -> None:
    with trio.fail_after(30):
        while states(engine) != list(wanted):
            await engine.pool.service_changed.wait()


def outstanding(engine: RemoteEngine) -> list[int]:
    return [row.outstanding for row in engine.statistics()]


async def until_full(fleet: Fleet) -> None:
    for watch in fleet.watches.values():
        await watch.until(
            lambda s: len(s.running) == CAP and all(len(r.output_ids) >= 5 for r in s.running)
        )


class CountsSegments(HttpTransport):
    """Real HTTP that counts the segments one server was asked for."""

    def __init__(self, address: str, wanted: int) -> None:
        super().__init__()
        self.reached = trio.Event()
        self._address, self._left = address, wanted

    async def request(
        self, base_url: str, request: HttpRequest, *args: Any, **more: Any
    ) -> HttpResponse:
        if base_url == self._address and "generate" in request.path:
            self._left -= 1
            if not self._left:
                self.reached.set()
        return await super().request(base_url, request, *args, **more)


# --- processes that are killed ------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_killed_under_load_loses_no_generation_and_comes_back(
    dialect: Any, tmp_path: Path
) -> None:
    first, second = save_weights(tmp_path, 1), save_weights(tmp_path, 2)
    options = ("--dialect", dialect, "--max-num-seqs", str(CAP), "--token-time-s", "0.002")
    with two_processes(first, *options) as (victim, survivor):
        config = RolloutConfig(
            servers=[victim.url, survivor.url],
            backend=dialect,
            segment_tokens=SEGMENT_TOKENS,
            **QUICK,
        )
        transport = CountsSegments(victim.url, 2 * CAP)  # all are in their second: some to lose
        async with transport, open_engine(config, transport=transport) as engine:
            generations = Generations(engine)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generations.run, GENERATIONS)
                await trio.testing.wait_all_tasks_blocked()
                assert outstanding(engine) == [CAP, CAP]
                assert engine.pool.waiting == GENERATIONS - 2 * CAP
                await transport.reached.wait()
                victim.kill()
                await until_states(engine, "ejected", "ready")
                victim.start()
            check_exact(generations.answers, {0: first}, GENERATIONS)
            for answer in generations.answers:  # what was lost was never more than one segment
                lengths = [segment.end - segment.start for segment in answer.segments]
                assert lengths == [16, 16, 16, 12]
            row = engine.statistics()[0]
            assert (row.ejections, row.failovers) == (1, engine.totals().failovers)
            assert CAP // 2 <= engine.totals().failovers <= CAP + 2  # two more until it was ejected

            await trio.to_thread.run_sync(victim.wait_listening)
            await engine.pool.wait_ready(30)
            await update_weights(engine.pool, WeightUpdate.from_disk(second, 1))
            victim.kill()
            victim.start()
            await trio.to_thread.run_sync(victim.wait_listening)
            again = Generations(engine)  # these are what notices
            await again.run(4 * CAP)
            check_exact(again.answers, {1: second}, 4 * CAP)
            await engine.pool.wait_ready(30)
            asked = engine.statistics()[0].requests
            final = Generations(engine)
            await final.run(4 * CAP)
            check_exact(final.answers, {1: second}, 4 * CAP)
            assert engine.statistics()[0].requests >= asked + CAP


# --- servers in this process --------------------------------------------------------------------


@asynccontextmanager
async def two_servers(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **config: Any
) -> AsyncIterator[tuple[RemoteEngine, Fleet]]:
    async with connected_engine(
        tmp_path,
        monkeypatch,
        2,
        {**QUICK, "segment_tokens": SEGMENT_TOKENS, **config},
        dialect=dialect,
        max_num_seqs=CAP,
        token_time_s=0.002,
    ) as connected:
        yield connected


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_cancelled_generations_are_gone_from_the_servers(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = GREEDY.new(max_new_tokens=1000)
    async with two_servers(dialect, tmp_path, monkeypatch, segment_tokens=None) as (engine, fleet):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Generations(engine, endless).run, 2 * CAP + 8)
            await until_full(fleet)
            nursery.cancel_scope.cancel()
        with trio.fail_after(2):
            for watch in fleet.watches.values():
                await watch.until(lambda s: not s.running and not s.waiting)
        assert outstanding(engine) == [0, 0]
        assert engine.pool.waiting == 0


@pytest.mark.parametrize("pause", ["keep", "abort"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_that_fails_an_update_is_named_and_out_until_it_has_the_weights(
    dialect: str, pause: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(dialect, tmp_path, monkeypatch, probe_interval_s=0.5) as (engine, fleet):
        broken, sound = fleet.urls
        generations = Generations(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generations.run, 4 * CAP)
            await until_full(fleet)
            fleet.servers[broken].faults.failing_loads = 2  # the first restoration fails as well
            update = WeightUpdate.from_disk(fleet.weights[2], 1, pause=pause)
            result = await update_weights(engine.pool, update)
            assert result.updated == (sound,)
            assert list(result.failed) == [broken]
            assert states(engine) == ["stale", "ready"]
            await fleet.watches[broken].until(lambda s: not s.running and not s.waiting)
            asked = engine.statistics()[0].requests
            with trio.fail_after(30):
                while states(engine)[0] == "stale":  # until supervision brings it back
                    assert engine.statistics()[0].requests == asked
                    await engine.pool.service_changed.wait()
            assert states(engine) == ["ready", "ready"]
        weights = {0: fleet.weights[1], 1: fleet.weights[2]}
        check_exact(generations.answers, weights, 4 * CAP)
        assert fleet.servers[broken].scheduler.state == "healthy"  # never asked while poisoned
        again = Generations(engine)
        await again.run(2 * CAP)
        check_exact(again.answers, {1: fleet.weights[2]}, 2 * CAP)
        assert engine.statistics()[0].requests > asked


@pytest.mark.parametrize("pause", ["keep", "abort"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_rolling_update_under_load_fails_nothing_and_leaves_always_one_ready(
    dialect: str, pause: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(dialect, tmp_path, monkeypatch) as (engine, fleet):
        generations, seen = Generations(engine), set()

        async def watch() -> None:
            while True:
                seen.add(tuple(states(engine)))
                await engine.pool.service_changed.wait()

        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generations.run, 4 * CAP)
                await until_full(fleet)
                update = WeightUpdate.from_disk(fleet.weights[2], 1, pause=pause, rolling=True)
                result = await update_weights(engine.pool, update)
                assert set(result.updated) == set(fleet.urls)
                assert engine.get_version() == 1
            watching.cancel_scope.cancel()
        check_exact(generations.answers, {0: fleet.weights[1], 1: fleet.weights[2]}, 4 * CAP)
        assert seen == {("ready", "ready"), ("paused", "ready"), ("ready", "paused")}
        assert any(len(set(a.output_versions.tolist())) == 2 for a in generations.answers)
        assert engine.totals().failovers == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_that_reports_other_weights_than_it_was_given_takes_no_traffic(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(dialect, tmp_path, monkeypatch, **NO_RETURN) as (engine, fleet):
        liar = fleet.servers[fleet.urls[0]]
        liar.faults.mislabel = "0"
        result = await update_weights(engine.pool, WeightUpdate.from_disk(fleet.weights[2], 1))
        assert result.updated == (fleet.urls[1],)
        assert "reports version 0 after it was given 1" in result.failed[fleet.urls[0]]
        generations = Generations(engine)
        await generations.run(4 * CAP)
        check_exact(generations.answers, {1: fleet.weights[2]}, 4 * CAP)
        assert states(engine) == ["stale", "ready"]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_whose_weights_somebody_else_labels_is_left_with_no_token_of_theirs(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(dialect, tmp_path, monkeypatch, **NO_RETURN) as (engine, fleet):
        changed, _ = fleet.urls
        generations = Generations(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generations.run, 4 * CAP)
            await until_full(fleet)
            server = engine.pool.named(changed)
            await engine.pool.control(server, engine.pool.dialect.label_weights(7), 10.0)
        check_exact(generations.answers, {0: fleet.weights[1]}, 4 * CAP)
        assert states(engine) == ["stale", "ready"]
        assert "reports version 7, not 0" in engine.statistics()[0].reason
        assert outstanding(engine) == [0, 0]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_storm_of_503_from_every_server_is_outlived(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def storm(_: str, request: HttpRequest) -> HttpResponse | None:
        if not request.path.endswith("generate") or len(refused) == 6 * CAP:
            return None
        refused.append(request)
        return HttpResponse(503, {"content-type": "text/html"}, b"<html>try again</html>")

    refused: list[HttpRequest] = []
    config = {**QUICK, "segment_tokens": SEGMENT_TOKENS, "max_failovers": 50}
    del config["vocab_size"]
    async with observed_engine(tmp_path, monkeypatch, dialect, 2, config, max_num_seqs=CAP) as (
        engine,
        observed,
    ):
        observed.transport.hook = storm
        generations = Generations(engine)
        with trio.fail_after(30):
            await generations.run(4 * CAP)
        check_exact(generations.answers, {0: observed.weights[1]}, 4 * CAP)
        assert len(refused) == 6 * CAP
        assert engine.totals().failovers == 6 * CAP
        assert engine.totals().tokens_regenerated == 0  # a refusal made none
        assert outstanding(engine) == [0, 0]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_that_never_answers_holds_no_generation_past_its_limit(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(dialect, tmp_path, monkeypatch, segment_timeout_s=1.0) as (
        engine,
        fleet,
    ):
        fleet.servers[fleet.urls[0]].faults.silent = True
        generations = Generations(engine)
        with trio.fail_after(30):
            await generations.run(2 * CAP)
        check_exact(generations.answers, {0: fleet.weights[1]}, 2 * CAP)
        assert engine.statistics()[0].ejections >= 1


# --- answers that are none ----------------------------------------------------------------------


async def late() -> bytes:
    """After the deadline, which the tests set to a fifth of it."""
    await trio.sleep(0.5)
    return http(b'{"choices":[]}')


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (at_once(http(b"<html>Bad Gateway</html>", 502, b"text/html")), "502.*HTML page"),
        (at_once(http(b"<html>hello</html>", 200, b"text/html")), "text/html"),
        (at_once(http(b'{"choices":[{"token_ids":[1,2')), "JSON|choices|bytes"),
        (at_once(http(b'{"output_ids":[1,2')), "JSON|bytes"),
        (at_once(http(b'{"error":{"message":"overloaded"}}', 503)), "503"),
        (at_once(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{"), "0.1 s|segment|total"),
        (never, "0.1 s|total|first"),
        (late, "0.1 s|total|first"),
    ],
    ids=[
        "HTML 502",
        "HTML 200",
        "cut JSON of vLLM",
        "cut JSON of SGLang",
        "503",
        "half a body",
        "never",
        "too late",
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_generations_go_on_beside_a_server_that_answers_nonsense(
    dialect: str, answer: Answer, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        connected_engine(
            tmp_path,
            monkeypatch,
            1,
            {**QUICK, **NO_RETURN, "segment_timeout_s": 0.1, "segment_tokens": 8},
            dialect=dialect,
            max_num_seqs=CAP,
        ) as (engine, fleet),
        scripted_server(answer) as broken,
    ):
        engine.pool.fleet.add(broken.url, cap=CAP)
        await engine.pool.wait_ready(10)
        short = GREEDY.new(max_new_tokens=16)
        generations = Generations(engine, short)
        await generations.run(2 * CAP)
        assert [a.output_len for a in generations.answers] == [16] * 2 * CAP
        assert {s.server for a in generations.answers for s in a.segments} == set(fleet.urls)
        assert broken.asked >= 3
        assert states(engine) == ["ready", "ejected"]
        assert re.search(words, engine.statistics()[1].reason)
        assert outstanding(engine) == [0, 0]


async def test_a_name_that_nobody_knows_is_said(tmp_path: Path) -> None:
    url = "http://no-such-host.invalid:8000"
    with pytest.raises(NoServerAvailable, match=r"no-such-host\.invalid"):
        async with open_engine(RolloutConfig(servers=[url], setup_timeout_s=1.0)):
            raise AssertionError("it opened")


def untrusted() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_a_certificate_that_nobody_trusts_is_said() -> None:
    async with scripted_server(never, untrusted()) as server:
        with pytest.raises(NoServerAvailable, match=r"(?i)certificate|TLS"):
            async with open_engine(RolloutConfig(servers=[server.url], setup_timeout_s=1.0)):
                raise AssertionError("it opened")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_servers_that_can_not_be_reached_are_added_beside_one_that_serves(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        two_servers(dialect, tmp_path, monkeypatch) as (engine, fleet),
        scripted_server(never, untrusted()) as stranger,
    ):
        engine.pool.fleet.add("http://no-such-host.invalid:8000")
        engine.pool.fleet.add("http://127.0.0.1:9")
        engine.pool.fleet.add(stranger.url)
        generations = Generations(engine)
        await generations.run(CAP)
        check_exact(generations.answers, {0: fleet.weights[1]}, CAP)
        assert states(engine) == ["ready", "ready", "joining", "joining", "joining"]
        with pytest.raises(NoServerAvailable) as caught:
            await engine.pool.wait_ready(0.5)
        assert "no-such-host.invalid:8000 is joining (ConnectFailed" in str(caught.value)
        assert re.search(rf"{stranger.url} is joining .*(?i:certificate)", str(caught.value))
        assert stranger.asked == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_is_in_the_pool_once_however_it_is_written(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(dialect, tmp_path, monkeypatch) as (engine, fleet):
        with pytest.raises(UsageError, match="is in the pool, ready"):
            engine.pool.fleet.add(fleet.urls[0] + "/")
        assert len(engine.pool.servers) == 2
        assert [row.cap for row in engine.statistics()] == [CAP, CAP]  # what each said it can run
