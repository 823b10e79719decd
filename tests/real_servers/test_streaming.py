"""Streams of real servers: what came is kept when one dies, with exact tokens and versions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.transport import HttpTransport
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
    ModelResponse,
)
from arealtrio.weights import WeightUpdate, update_weights
from arealtrio.wire.dialect import ServerLoad

from .server import CAP, VllmServer
from .until import LOOK_EVERY_S

pytestmark = pytest.mark.real_servers

# So long that no server is at the end before a client, however busy, has heard of the beginning:
# four seconds at the best speed that this model has.
LENGTH = 3000
STREAMS = 2  # on each server
TOKENS_BEFORE = 20  # that have come of each when something happens to it
GREEDY = GenerationHyperparameters(greedy=True, ignore_eos=True, max_new_tokens=LENGTH)
LOGPROB_TOLERANCE = 1e-4


def prompt(number: int) -> list[int]:
    return [5 + number % 300, 17, 99, 200 + number % 100]


@dataclass
class Heard:
    """One stream as it came over the wire, read by the standard library alone."""

    server: str
    tokens: list[int] = field(default_factory=list)
    spans: list[dict[str, Any]] | None = None
    _rest: bytes = b""

    def hear(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            said = event.removeprefix(b"data: ")
            if said == b"[DONE]":
                continue
            for choice in json.loads(said)["choices"]:
                self.tokens += choice["token_ids"]
                self.spans = choice["weight_versions"] or self.spans

    @property
    def versions(self) -> list[int]:
        """Of each token, as the server reports at the end."""
        assert self.spans is not None
        return [int(s["version"]) for s in self.spans for _ in range(s["start"], s["end"])]


class Overhearing(HttpTransport):
    """Real HTTP; every stream's events are noted under its generation as they pass."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, list[Heard]] = {}  # rid -> its streams, in order
        self.unread: str | None = None  # a server of which no stream is read on, once it has begun
        self.read_on = trio.Event()
        self._changed = trio.Event()

    @asynccontextmanager
    async def stream(
        self, base_url: str, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        rid = dict(request.headers)["X-Request-Id"].rpartition("-")[0]
        mine = Heard(base_url)
        self.heard.setdefault(rid, []).append(mine)
        async with super().stream(base_url, request, *args, **kwargs) as response:
            yield _Passing(response, mine, self._pass_on)

    async def _pass_on(self, mine: Heard) -> None:
        self._changed.set()
        self._changed = trio.Event()
        if mine.server == self.unread and len(mine.tokens) >= TOKENS_BEFORE:
            await self.read_on.wait()

    async def until(self, holds: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Return in the turn in which ``holds()`` of what was heard."""
        with trio.fail_after(limit_s):
            while not holds():
                await self._changed.wait()

    def of(self, server: str) -> list[Heard]:
        """The streams of one server."""
        return [one for streams in self.heard.values() for one in streams if one.server == server]


class _Passing:
    """A streamed response that lets somebody listen."""

    def __init__(
        self, response: Any, heard: Heard, pass_on: Callable[[Heard], Awaitable[None]]
    ) -> None:
        self.status, self.headers = response.status, response.headers
        self._response, self._heard, self._pass_on = response, heard, pass_on

    async def chunks(self) -> AsyncIterator[bytes]:
        async for piece in self._response.chunks():
            self._heard.hear(piece)
            await self._pass_on(self._heard)
            yield piece


@asynccontextmanager
async def overheard(
    servers: Sequence[VllmServer], **changes: Any
) -> AsyncIterator[tuple[RemoteEngine, Overhearing]]:
    transport = Overhearing()
    given = {"streaming": True, "probe_interval_max_s": 2.0, **changes}
    try:
        config = RolloutConfig(servers=[server.url for server in servers], **given)
        async with open_engine(config, transport=transport) as engine:
            yield engine, transport
    finally:
        with trio.CancelScope(shield=True):
            await transport.aclose()


class Answers(dict[int, ModelResponse]):
    """Of many generations at once, by number."""

    async def collect(
        self, engine: RemoteEngine, count: int, gconfig: GenerationHyperparameters = GREEDY
    ) -> None:
        async def one(number: int) -> None:
            request = ModelRequest(prompt(number), gconfig, rid=f"g{number}")
            self[number] = await engine.agenerate(request)

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(one, number)


def check_whole(answers: Answers, transport: Overhearing, count: int) -> None:
    """Each has its length, and is, token for token, what was heard.

    Its versions are known unless a stream of it broke off after some tokens, before the report.
    """
    assert sorted(answers) == list(range(count))
    for answer in answers.values():
        heard = transport.heard[answer.rid]
        assert answer.output_len == LENGTH == len(answer.output_logprobs)
        assert answer.output_tokens.tolist() == [t for one in heard for t in one.tokens]
        assert answer.versions_exact is all(one.spans or not one.tokens for one in heard)


async def check_greedy(server: VllmServer, answers: Answers) -> None:
    """What the weights think of the tokens, asked past the library, of some of the answers."""
    for number in (0, len(answers) // 2, len(answers) - 1):
        answer = answers[number]
        ids = [*answer.input_tokens.tolist(), *answer.output_tokens.tolist()]
        made = (await trio.to_thread.run_sync(server.score, ids))[answer.input_len - 1 :]
        thought = np.array([score.logprob for score in made])
        np.testing.assert_allclose(answer.output_logprobs, thought, rtol=0, atol=LOGPROB_TOLERANCE)
        assert all(score.logprob >= score.best - LOGPROB_TOLERANCE for score in made)


async def test_a_server_killed_in_mid_stream_costs_no_token_that_came(
    vllm_servers: Sequence[VllmServer],
) -> None:
    victim, survivor = vllm_servers
    answers = Answers()
    async with overheard(vllm_servers) as (engine, transport):
        transport.unread = victim.url  # so that its end can not be here before it is killed
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers.collect, engine, 2 * STREAMS)
            await transport.until(lambda: begun(transport.of(victim.url)) == STREAMS)
            victim.kill()
            transport.read_on.set()
        check_whole(answers, transport, 2 * STREAMS)
        hit = [answer for answer in answers.values() if len(answer.segments) > 1]
        assert len(hit) == STREAMS
        kept = 0
        for answer in hit:
            first, second = transport.heard[answer.rid]
            assert [s.server for s in answer.segments] == [victim.url, survivor.url]
            assert answer.segments[0].end == len(first.tokens) >= TOKENS_BEFORE
            assert first.spans is None  # they come with the last token: what it had is pinned
            assert second.versions == [0] * len(second.tokens)
            kept += len(first.tokens)
        assert {v for a in answers.values() for v in a.output_versions.tolist()} == {0}
        totals = engine.totals()
        assert (totals.failovers, totals.tokens_kept) == (len(hit), kept)
        assert (totals.tokens_regenerated, totals.tokens_lost, totals.tokens_discarded) == (0, 0, 0)
        assert totals.tokens_generated == 2 * STREAMS * LENGTH
    await check_greedy(survivor, answers)


def begun(streams: Sequence[Heard]) -> int:
    """How many have brought enough for something to happen to them."""
    return sum(len(one.tokens) >= TOKENS_BEFORE for one in streams)


async def test_versions_of_a_stream_through_an_update_are_the_servers_own(
    vllm_servers: Sequence[VllmServer],
) -> None:
    answers = Answers()
    path = vllm_servers[0].models / "tiny-2"
    async with overheard(vllm_servers) as (engine, transport):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers.collect, engine, 2 * STREAMS)
            urls = [server.url for server in vllm_servers]
            await transport.until(lambda: all(begun(transport.of(url)) == STREAMS for url in urls))
            await update_weights(engine.pool, WeightUpdate.from_disk(path, 1, pause="keep"))
        check_whole(answers, transport, 2 * STREAMS)
        for answer in answers.values():
            (heard,) = transport.heard[answer.rid]  # frozen and gone on with, not sent again
            assert answer.output_versions.tolist() == heard.versions
        # A server may have come to its end before the other had begun, but not both.
        seen = [set(answer.output_versions.tolist()) for answer in answers.values()]
        assert {0, 1} in seen
        assert engine.totals().tokens_regenerated == 0


async def test_cancelled_streams_are_gone_from_the_servers(
    vllm_servers: Sequence[VllmServer],
) -> None:
    endless = GREEDY.new(max_new_tokens=12000)
    async with overheard(vllm_servers) as (engine, transport):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Answers().collect, engine, 2 * CAP, endless)
            await transport.until(
                lambda: begun([s for v in transport.heard.values() for s in v]) > CAP
            )
            nursery.cancel_scope.cancel()
        heard = sum(len(one.tokens) for streams in transport.heard.values() for one in streams)
        totals = engine.totals()
        assert (totals.tokens_lost, totals.tokens_generated) == (heard, 0)
        assert totals.aborts_sent == 2 * CAP
        left = [await trio.to_thread.run_sync(server.in_flight) for server in vllm_servers]
        assert left == [0, 0]
        assert [row.outstanding for row in engine.statistics()] == [0, 0]


async def test_the_signs_of_pressure_are_read_of_a_real_server(vllm_server: VllmServer) -> None:
    """What ``adaptive_caps`` looks at: who runs, who waits, the cache, and who was put back."""
    endless = GREEDY.new(max_new_tokens=12000)
    async with overheard([vllm_server], max_requests_per_server=CAP + 3) as (engine, _):
        server = engine.pool.servers[0]
        idle = await load_when(engine, lambda load: load.running == 0)
        assert (idle.waiting, idle.preempted) == (0, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Answers().collect, engine, CAP + 3, endless)
            busy = await load_when(engine, lambda load: (load.running, load.waiting) == (CAP, 3))
            assert 0 < busy.kv_cache_usage < 1
            fuller = await load_when(engine, lambda load: load.kv_cache_usage > busy.kv_cache_usage)
            assert fuller.preemptions == busy.preemptions == idle.preemptions
            nursery.cancel_scope.cancel()
        answers = Answers()
        await answers.collect(engine, 3, GREEDY.new(max_new_tokens=5))
        done = await load_when(engine, lambda load: load.running == 0)
        assert done.requests_finished >= idle.requests_finished + 3
        assert server.allowed == server.cap == CAP + 3


async def load_when(engine: RemoteEngine, holds: Callable[[ServerLoad], bool]) -> ServerLoad:
    """The first report of which something holds; a server is outside, so it is asked again."""
    with trio.fail_after(60):
        while True:
            load = await engine.pool.load_of(engine.pool.servers[0])
            if holds(load):
                return load
            await trio.sleep(LOOK_EVERY_S)


async def test_a_chat_is_the_tokens_that_the_server_makes_of_it(vllm_server: VllmServer) -> None:
    messages = [{"role": "user", "content": "what is 12 plus 30?"}]
    gconfig = GREEDY.new(max_new_tokens=24)
    async with overheard([vllm_server]) as (engine, _):
        answer = await engine.agenerate(ModelRequest(gconfig=gconfig, messages=messages))
        question = {
            "model": "tiny",
            "messages": messages,
            "max_tokens": 1,
            "return_token_ids": True,
        }
        asked = HttpRequest("POST", "/v1/chat/completions", json.dumps(question).encode())
        told: HttpResponse = await engine.pool.send(
            engine.pool.servers[0], asked, engine.config.segment_limits()
        )
    assert answer.input_tokens.tolist() == json.loads(told.body)["prompt_token_ids"]
    assert (answer.output_len, answer.stop_reason) == (24, "length")
    assert set(answer.output_versions.tolist()) == {0}
    await check_greedy(vllm_server, Answers({0: answer}))


async def test_a_cancelled_chat_is_found_by_its_id(vllm_server: VllmServer) -> None:
    messages = [{"role": "user", "content": "count"}]
    endless = GREEDY.new(max_new_tokens=12000)
    async with overheard([vllm_server]) as (engine, _):
        async with trio.open_nursery() as nursery:
            request = ModelRequest(gconfig=endless, messages=messages, rid="my-chat")
            nursery.start_soon(engine.agenerate, request)
            await load_when(engine, lambda load: load.running == 1)
            abort = engine.pool.dialect.abort(
                "my-chat-0000", engine.pool.servers[0].info, chat=True
            )
            with pytest.RaisesGroup(pytest.RaisesExc(Exception, match="uses messages")):
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(engine.agenerate, ModelRequest(
                        gconfig=endless, messages=messages, rid="other-chat"))  # fmt: skip
                    await load_when(engine, lambda load: load.running == 2)
                    other = engine.pool.dialect.abort(
                        "other-chat-0000", engine.pool.servers[0].info, chat=True
                    )
                    await engine.pool.control(engine.pool.servers[0], other, 10.0)
            assert abort.path == "/abort_requests"
            await load_when(engine, lambda load: load.running == 1)  # the first was let alone
            nursery.cancel_scope.cancel()
        assert await trio.to_thread.run_sync(vllm_server.in_flight) == 0
