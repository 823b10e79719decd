"""Streamed generation: what came is kept, whoever dies, and is what one server would have given."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from arealtrio.config import RolloutConfig
from arealtrio.embedded.serve import ServerSettings, running_server
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import RequestRejected, RolloutError, TransportError, TransportTimeout
from arealtrio.servers import ServerPool
from arealtrio.tally import EngineStatistics
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    ModelRequest,
    ModelResponse,
)

from .embedded_server import MAX_MODEL_LEN, PROMPT, VOCAB_SIZE, save_weights
from .fleet import connected_engine
from .scripted import Events, Scripted, next_tokens, token_event, whole
from .test_engine import GREEDY, check_lengths, greedy_answer

# --- servers that stream ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "settings", "streamed"),
    [
        ("vllm", {}, True),
        ("sglang", {"incremental_streaming_output": True}, True),
        ("sglang", {}, False),
    ],
)
async def test_a_streamed_answer_is_the_models_own(
    dialect: Any, settings: dict[str, Any], streamed: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    weights = save_weights(tmp_path, 1)
    chosen = ServerSettings(
        weights=weights, dialect=dialect, max_model_len=MAX_MODEL_LEN, **settings
    )
    asked: list[bool] = []
    whole = ServerPool.send

    async def send(self: ServerPool, server: Any, request: HttpRequest, limits: Any) -> Any:
        asked.append("generate" in request.path and request.method == "POST")
        return await whole(self, server, request, limits)

    monkeypatch.setattr(ServerPool, "send", send)
    async with running_server(chosen) as server:
        config = RolloutConfig(
            servers=[server.url], backend=dialect, streaming=True, vocab_size=VOCAB_SIZE
        )
        if streamed:
            response = await answer_of(config)
        else:
            with pytest.warns(UserWarning, match="--incremental-streaming-output"):
                response = await answer_of(config)
    check_lengths(response)
    assert any(asked) is not streamed
    assert response.output_tokens.tolist() == greedy_answer(weights, PROMPT, 40)
    assert (response.stop_reason, response.versions_exact) == ("length", True)
    assert set(response.output_versions.tolist()) == {0}


async def answer_of(config: RolloutConfig) -> ModelResponse:
    async with open_engine(config) as engine:
        return await engine.agenerate(ModelRequest(PROMPT, GREEDY))


async def test_an_interruption_of_a_stream_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"streaming": True}
    async with (
        connected_engine(tmp_path, monkeypatch, config=config, token_time_s=0.002) as (
            engine,
            fleet,
        ),
        trio.open_nursery() as nursery,
    ):
        answer: list[ModelResponse] = []

        async def generate() -> None:
            answer.append(await engine.agenerate(ModelRequest(PROMPT, GREEDY)))

        nursery.start_soon(generate)
        await fleet.watch.until(lambda s: any(len(r.output_ids) >= 15 for r in s.running))
        async with engine.paused(mode="abort") as failed:
            assert failed == {}
    assert answer[0].output_tokens.tolist() == greedy_answer(fleet.weights[1], PROMPT, 40)
    assert len(answer[0].segments) == 2
    assert engine.totals().interruptions == 1
    assert engine.totals().tokens_generated == 40


async def test_cancelling_a_stream_aborts_it_and_gives_the_slot_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(
        tmp_path, monkeypatch, config={"streaming": True}, token_time_s=0.01
    ) as (engine, fleet):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.agenerate, ModelRequest(PROMPT, GREEDY))
            await fleet.watch.until(lambda s: any(len(r.output_ids) >= 2 for r in s.running))
            nursery.cancel_scope.cancel()
        await fleet.watch.until(lambda s: not s.running and not s.waiting)
        assert [row.outstanding for row in engine.statistics()] == [0]
        assert engine.totals().aborts_sent == 1


async def test_a_refusal_in_a_stream_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"streaming": True, "model": "nobody"}
    async with connected_engine(tmp_path, monkeypatch, config=config) as (engine, _):
        with pytest.raises(RequestRejected, match="nobody"):
            await engine.agenerate(ModelRequest(PROMPT, GREEDY))
        assert engine.totals().failovers == 0


# --- servers that die in mid-stream -------------------------------------------------------------

FOUR = GenerationHyperparameters(greedy=True, max_new_tokens=4)


A, B = "http://a:1", "http://b:1"
SPANS = {"weight_versions": [{"version": "0", "start": 0, "end": 4}]}


def dies_after(count: int, error: Callable[[], Exception]) -> Callable[..., Events]:
    """The first stream: it brings so many tokens, and then ``error`` is raised by the transport."""

    async def die() -> None:
        raise error()

    def script(turn: int, question: dict[str, Any]) -> Events:
        return [*whole(question)[:count], die] if turn == 0 else whole(question)

    return script


@asynccontextmanager
async def scripted(
    script: Callable[[int, dict[str, Any]], Events], **config: Any
) -> AsyncIterator[tuple[RemoteEngine, Scripted]]:
    transport = Scripted(script)
    chosen = RolloutConfig(servers=[A, B], streaming=True, **config)
    async with open_engine(chosen, transport=transport) as engine:
        yield engine, transport


def check_undisturbed(response: ModelResponse, count: int = 4) -> None:
    check_lengths(response)
    assert response.output_tokens.tolist() == list(range(105, 105 + count))
    expected = -np.arange(105, 105 + count, dtype=np.float32) / 8
    np.testing.assert_array_equal(response.output_logprobs, expected)


def check_totals(totals: EngineStatistics, **expected: int) -> None:
    assert {name: getattr(totals, name) for name in expected} == expected


ERRORS = [TransportError("it broke off"), TransportTimeout("nothing came", limit="idle_s")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
async def test_what_a_dying_server_streamed_is_kept_and_the_rest_is_made_elsewhere(
    count: int, error: Exception
) -> None:
    async with scripted(dies_after(count, lambda: error)) as (engine, transport):
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert response.versions_exact is (count == 0)  # no report came for what broke off
        (first, asked), (second, asked_again) = transport.streams
        assert {first, second} == {A, B}
        assert transport.aborted == [first]
        assert len(asked_again["token_ids"]) == len(asked["token_ids"]) + count
        assert [(s.server, s.end - s.start) for s in response.segments] == (
            [(first, count)] if count else []
        ) + [(second, 4 - count)]
        check_totals(
            engine.totals(), failovers=1, tokens_generated=4, tokens_kept=count,
            tokens_regenerated=0, tokens_lost=0, aborts_sent=1,
        )  # fmt: skip
        assert [row.outstanding for row in engine.statistics()] == [0, 0]


async def test_the_last_token_need_not_be_followed_by_the_servers_word_on_it() -> None:
    def script(turn: int, question: dict[str, Any]) -> Events:
        async def die() -> None:
            raise TransportError("it broke off")

        return [*map(token_event, next_tokens(question)), die]

    async with scripted(script, max_failovers=0) as (engine, transport):
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert response.stop_reason == "length"
        assert len(transport.streams) == 1
        check_totals(engine.totals(), failovers=0, tokens_generated=4)


async def test_an_answer_that_is_whole_is_taken_though_the_connection_breaks_after_it() -> None:
    async with scripted(dies_after(4, lambda: TransportError("late"))) as (engine, transport):
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert (len(transport.streams), transport.aborted) == (1, [])
        check_totals(engine.totals(), failovers=0)


async def test_what_came_before_an_update_of_a_server_that_then_died_is_not_known_exactly() -> None:
    engines: list[RemoteEngine] = []

    def script(turn: int, question: dict[str, Any]) -> Events:
        async def update_and_die() -> None:
            for server in engines[0].pool.servers:
                server.version = 1
            engines[0].pool.advance(1, ())
            raise TransportError("it broke off")

        if turn == 0:
            return [*whole(question)[:2], update_and_die]
        return [event.replace(b'"0"', b'"1"') for event in whole(question)
                if isinstance(event, bytes)]  # fmt: skip

    async with scripted(script) as (engine, _):
        engines.append(engine)
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert response.output_versions.tolist() == [0, 0, 1, 1]
        assert not response.versions_exact


GARBAGE: list[tuple[str, Events]] = [
    ("not JSON", [b"data: {\n\n"]),
    ("an end without a reason", []),
    ("spans that do not fit", [token_event(9, "length", **SPANS)]),
]


@pytest.mark.parametrize(("name", "ending"), GARBAGE, ids=[name for name, _ in GARBAGE])
async def test_nothing_of_a_stream_that_breaks_the_protocol_is_believed(
    name: str, ending: Events
) -> None:
    def script(turn: int, question: dict[str, Any]) -> Events:
        return [*whole(question)[:2], *ending] if turn == 0 else whole(question)

    async with scripted(script) as (engine, transport):
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert [s.server for s in response.segments] == [transport.streams[1][0]]
        lost = 3 if "spans" in name else 2
        check_totals(
            engine.totals(), tokens_lost=lost, tokens_regenerated=lost, tokens_generated=4,
            tokens_kept=0, failovers=1,
        )  # fmt: skip


async def test_what_a_server_that_failed_had_streamed_is_kept() -> None:
    failure = b'data: {"error":{"message":"EngineCore died","code":500}}\n\n'

    def script(turn: int, question: dict[str, Any]) -> Events:
        return [*whole(question)[:3], failure] if turn == 0 else whole(question)

    async with scripted(script) as (engine, _):
        check_undisturbed(await engine.agenerate(ModelRequest(PROMPT, FOUR)))
        check_totals(engine.totals(), tokens_kept=3, tokens_lost=0)


async def test_what_a_server_of_unknown_weights_had_streamed_is_dropped() -> None:
    engines: list[RemoteEngine] = []
    transports: list[Scripted] = []

    def script(turn: int, question: dict[str, Any]) -> Events:
        async def be_found_out() -> None:
            ((address, _),) = transports[0].streams
            server = engines[0].pool.named(address)
            engines[0].pool.mark_stale(server, "it reports version 7, not 0")
            server.cut_off()
            await trio.sleep_forever()

        return [*whole(question)[:2], be_found_out] if turn == 0 else whole(question)

    async with scripted(script) as (engine, transport):
        engines.append(engine)
        transports.append(transport)
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert [s.server for s in response.segments] == [transport.streams[1][0]]
        check_totals(engine.totals(), tokens_lost=2, tokens_regenerated=2, tokens_kept=0)


@pytest.mark.parametrize("inexact", [False, True])
async def test_where_going_on_would_not_be_exact_the_tokens_are_made_again(inexact: bool) -> None:
    async with scripted(
        dies_after(2, lambda: TransportError("it broke off")), allow_inexact_resume=inexact
    ) as (engine, transport):
        penalised = FOUR.new(frequency_penalty=0.5)
        check_undisturbed(await engine.agenerate(ModelRequest(PROMPT, penalised)))
        assert len(transport.streams[1][1]["token_ids"]) == len(PROMPT) + 2 * inexact
        check_totals(engine.totals(), tokens_lost=0 if inexact else 2)


async def test_a_generation_whose_every_server_dies_ends_with_the_reason() -> None:
    def script(turn: int, question: dict[str, Any]) -> Events:
        async def die() -> None:
            raise TransportError(f"stream {turn} broke off")

        return [die]

    async with scripted(script, max_failovers=1) as (engine, transport):
        with pytest.raises(RolloutError, match="broke off") as caught:
            await engine.agenerate(ModelRequest(PROMPT, FOUR))
        assert "max_failovers" in "".join(caught.value.__notes__)
        assert len(transport.streams) == 2


async def test_each_token_is_streamed_once_however_often_servers_die() -> None:
    async def die() -> None:
        raise TransportError("it broke off")

    def script(_: int, question: dict[str, Any]) -> Events:
        return [*whole(question)[:1], die]

    async with scripted(script, max_failovers=10, eject_after_failures=99,
                        failover_interval_s=1e-6) as (engine, transport):  # fmt: skip
        response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
        check_undisturbed(response)
        assert [len(q["token_ids"]) for _, q in transport.streams] == [5, 6, 7, 8]
        check_totals(engine.totals(), tokens_generated=4, tokens_lost=0, tokens_regenerated=0)


# --- over real sockets --------------------------------------------------------------------------


class Silent:
    """A server whose first stream brings so many tokens and no more; those after it are whole."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[int] = []  # how many ids each question held

    async def serve(self, stream: trio.SocketStream) -> None:
        data = b""
        async for piece in stream:
            data += piece
            head, found, body = data.partition(b"\r\n\r\n")
            if found and len(body) >= length_of(head):
                data = b""
                await self.answer(stream, head.split()[1], body)

    async def answer(self, stream: trio.SocketStream, path: bytes, body: bytes) -> None:
        if path == b"/v1/models":
            await stream.send_all(plain(b'{"data":[{"id":"m"}]}'))
        elif path == b"/inference/v1/generate" and not body:
            await stream.send_all(plain(b"", 405))
        elif path == b"/inference/v1/generate":
            await self.stream(stream, json.loads(body))
        elif path == b"/health" or b"abort" in path:
            await stream.send_all(plain(b""))
        else:
            await stream.send_all(plain(b"{}", 404))

    async def stream(self, stream: trio.SocketStream, question: dict[str, Any]) -> None:
        self.asked.append(len(question["token_ids"]))
        head = (
            b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
        )
        events = [event for event in whole(question) if isinstance(event, bytes)]
        sent = events[: self.tokens] if len(self.asked) == 1 else events
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in sent)
        ending = b"0\r\n\r\n" if sent is events else b""
        # With nothing to say, not even the head is sent.
        await stream.send_all(head + b"\r\n" + chunks + ending if sent else b"")


def length_of(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.split(b"\r\n")[0]) if found else 0


def plain(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


@pytest.mark.parametrize(
    ("tokens", "limits"),
    [(2, {"idle_timeout_s": 0.1}), (0, {"first_byte_timeout_s": 0.1})],
    ids=["idle", "first byte"],
)
async def test_a_server_that_falls_silent_is_left_with_what_it_sent(
    tokens: int, limits: dict[str, Any]
) -> None:
    server = Silent(tokens)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, server.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        config = RolloutConfig(servers=[f"http://127.0.0.1:{port}"], streaming=True, **limits)
        async with open_engine(config) as engine:
            response = await engine.agenerate(ModelRequest(PROMPT, FOUR))
            check_undisturbed(response)
            assert server.asked == [5, 5 + tokens]
            check_totals(engine.totals(), failovers=1, tokens_kept=tokens, aborts_sent=1)
        nursery.cancel_scope.cancel()
