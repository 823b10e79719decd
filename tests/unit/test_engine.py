"""Generation against embedded servers over real sockets, and against servers that misbehave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.embedded.model import TinyModel
from arealtrio.engine import RemoteEngine, make_dialect, open_engine
from arealtrio.errors import (
    ArealTrioError,
    ConfigError,
    InvalidRequest,
    NoServerAvailable,
    ProtocolError,
    RequestRejected,
    ResponseTooLarge,
    RolloutClosed,
    RolloutError,
    ServerError,
    TransportError,
)
from arealtrio.servers import Server
from arealtrio.transport import HttpTransport
from arealtrio.types import GenerationHyperparameters, HttpRequest, ModelRequest, ModelResponse
from arealtrio.weights import WeightUpdate, update_weights

from .embedded_server import MAX_MODEL_LEN, PROMPT, VOCAB_SIZE
from .fleet import Fleet, connected_engine
from .scripted_server import ScriptedServer, never, scripted_server

GREEDY = GenerationHyperparameters(greedy=True, max_new_tokens=40, ignore_eos=True)
LONGER = GREEDY.new(max_new_tokens=200)
LONG = GREEDY.new(max_new_tokens=MAX_MODEL_LEN)


def greedy_answer(weights: Path, prompt: list[int], count: int) -> list[int]:
    """What the weights say, asked of the model itself."""
    model, tokens = TinyModel.load(weights), list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(model.next_logits([tokens])[0])))
    return tokens[len(prompt) :]


def check_lengths(response: ModelResponse) -> None:
    """Invariant I8."""
    assert response.output_tokens.dtype == np.int32
    assert response.output_logprobs.dtype == np.float32
    assert response.output_versions.dtype == np.int32
    count = len(response.output_tokens)
    assert len(response.output_logprobs) == len(response.output_versions) == count
    assert np.all(np.diff(response.output_versions) >= 0)
    assert [s.start for s in response.segments][1:] == [s.end for s in response.segments][:-1]


async def test_a_greedy_answer_is_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch) as (engine, fleet):
        response = await engine.agenerate(ModelRequest(PROMPT, GREEDY))
    check_lengths(response)
    assert response.output_tokens.tolist() == greedy_answer(fleet.weights[1], PROMPT, 40)
    model = TinyModel.load(fleet.weights[1])
    whole = np.concatenate([response.input_tokens, response.output_tokens])
    expected = model.logprobs(whole, len(PROMPT))
    np.testing.assert_allclose(response.output_logprobs, expected, atol=1e-4)
    assert set(response.output_versions.tolist()) == {0}
    assert response.versions_exact
    assert response.stop_reason == "length"


async def test_fifty_at_once_on_two_servers_never_exceed_a_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, 2, max_num_seqs=3) as (engine, fleet):
        answers = []

        async def one(number: int) -> None:
            answers.append(await engine.agenerate(ModelRequest([number % 300 + 3], GREEDY)))
            assert all(row.outstanding <= 3 for row in engine.statistics())

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        assert len(answers) == 50
        assert [row.cap for row in engine.statistics()] == [3, 3]
        assert min(row.requests for row in engine.statistics()) >= 15
        assert all(row.outstanding == 0 for row in engine.statistics())
        assert fleet.nothing_left()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ModelRequest([], GREEDY), "prompt is empty"),
        (ModelRequest([1, VOCAB_SIZE], GREEDY), f"token id {VOCAB_SIZE}"),
        (ModelRequest(PROMPT, GREEDY.new(n_samples=2)), "group_size"),
        (ModelRequest([5] * MAX_MODEL_LEN, GREEDY), "no room for new tokens"),
        (ModelRequest(PROMPT, GREEDY.new(max_tokens=5)), "no room for new tokens"),
    ],
)
async def test_what_no_server_should_see_is_refused_before_it_is_sent(
    request_: ModelRequest, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, config={"vocab_size": VOCAB_SIZE}) as (
        engine,
        _,
    ):
        with pytest.raises(InvalidRequest, match=words):
            await engine.agenerate(request_)
        assert [row.requests for row in engine.statistics()] == [0]


async def test_the_budget_is_what_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch) as (engine, _):
        room = await engine.agenerate(ModelRequest([5] * (MAX_MODEL_LEN - 7), GREEDY))
        assert room.output_len == 7
        total = await engine.agenerate(ModelRequest(PROMPT, GREEDY.new(max_tokens=9)))
        assert total.output_len == 4


async def test_an_aborted_generation_goes_on_from_what_it_has_and_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, token_time_s=0.002) as (engine, fleet):
        answer: list[ModelResponse] = []
        at_head: list[bool] = []
        lease = engine.pool.lease

        def noted(**how: Any) -> Any:
            at_head.append(how["at_head"])
            return lease(**how)

        monkeypatch.setattr(engine.pool, "lease", noted)

        async def generate() -> None:
            answer.append(
                await engine.agenerate(ModelRequest(PROMPT, GREEDY.new(max_new_tokens=200)))
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            for _ in range(3):  # an output is of one segment: it begins anew after each abort
                await fleet.watch.until(lambda s: any(len(r.output_ids) >= 15 for r in s.running))
                async with engine.paused(mode="abort") as failed:
                    assert failed == {}
        (response,) = answer
    check_lengths(response)
    assert len(response.segments) == 4
    assert at_head == [False, True, True, True]  # what was interrupted waits before all others
    assert response.output_tokens.tolist() == greedy_answer(fleet.weights[1], PROMPT, 200)


async def test_tokens_know_their_weights_across_an_update_in_mid_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, token_time_s=0.002) as (engine, fleet):
        answer: list[ModelResponse] = []

        async def generate() -> None:
            answer.append(
                await engine.agenerate(ModelRequest(PROMPT, GREEDY.new(max_new_tokens=200)))
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            await fleet.watch.until(lambda s: any(len(r.output_ids) >= 20 for r in s.running))
            await update_weights(engine.pool, WeightUpdate.from_disk(fleet.weights[2], 1))
        (response,) = answer
    check_lengths(response)
    assert response.versions_exact
    assert len(response.segments) == 1  # frozen and finished, not sent again
    changed = int(np.argmax(response.output_versions))
    assert 20 <= changed < 200
    whole = [*PROMPT, *response.output_tokens.tolist()]
    for start, stop, seed in ((0, changed, 1), (changed, 200, 2)):
        expected = greedy_answer(fleet.weights[seed], whole[: len(PROMPT) + start], stop - start)
        assert response.output_tokens[start:stop].tolist() == expected


async def test_a_continuation_is_refused_where_it_would_not_be_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalised = GREEDY.new(max_new_tokens=200, frequency_penalty=0.5)
    for allowed in (False, True):
        async with connected_engine(
            tmp_path / str(allowed),
            monkeypatch,
            config={"allow_inexact_resume": allowed},
            token_time_s=0.002,
        ) as (engine, fleet):
            outcome: list[object] = []

            async def generate(engine: RemoteEngine = engine, out: list[object] = outcome) -> None:
                try:
                    out.append(await engine.agenerate(ModelRequest(PROMPT, penalised)))
                except RolloutError as exc:
                    out.append(exc)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate)
                await fleet.watch.until(lambda s: any(len(r.output_ids) >= 5 for r in s.running))
                async with engine.paused(mode="abort"):
                    pass
            (what,) = outcome
            if allowed:
                assert isinstance(what, ModelResponse)
                assert what.output_len == 200
            else:
                assert isinstance(what, RolloutError)
                assert "allow_inexact_resume" in str(what)
            assert [row.outstanding for row in engine.statistics()] == [0]


async def test_cancelling_aborts_the_request_on_its_server_and_gives_the_slot_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, token_time_s=0.002, max_num_seqs=4) as (
        engine,
        fleet,
    ):
        answered: list[str] = []
        control = engine.pool.control

        async def noted(server: Server, request: HttpRequest, timeout_s: float) -> None:
            await control(server, request, timeout_s)
            answered.append(request.path)  # though whoever sent it was cancelled

        monkeypatch.setattr(engine.pool, "control", noted)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(engine.agenerate, ModelRequest(PROMPT, LONG))
            await fleet.watch.until(lambda s: len(s.running) == 4)
            nursery.cancel_scope.cancel()
        assert len(answered) == engine.totals().aborts_sent == 4
        assert all(path.endswith("/abort_requests") for path in answered)
        await fleet.watch.until(lambda s: not s.running and not s.waiting)
        assert [row.outstanding for row in engine.statistics()] == [0]
        assert engine.pool.waiting == 0


async def generation_over_a_transport_that_closes(
    act: Callable[[HttpTransport, trio.CancelScope], Awaitable[None]],
) -> trio.CancelScope:
    """Act while a server generates; return the scope of whoever waits for the answer."""
    waits = trio.CancelScope()
    async with scripted_server(never) as server, HttpTransport() as transport:
        config = RolloutConfig(servers=[server.url])
        async with open_engine(config, transport=transport) as engine, trio.open_nursery() as other:
            other.start_soon(act_when_asked, server, act, transport, waits)
            with waits:
                await engine.agenerate(ModelRequest(PROMPT, GREEDY))
    return waits


async def act_when_asked(
    server: ScriptedServer,
    act: Callable[[HttpTransport, trio.CancelScope], Awaitable[None]],
    transport: HttpTransport,
    waits: trio.CancelScope,
) -> None:
    while not server.asked:
        await trio.testing.wait_all_tasks_blocked()
    await act(transport, waits)


async def test_a_generation_over_a_transport_that_closes_ends_with_a_word_on_that() -> None:
    async def close(transport: HttpTransport, waits: trio.CancelScope) -> None:
        await transport.aclose()

    with pytest.raises(ExceptionGroup) as caught:
        await generation_over_a_transport_that_closes(close)
    assert caught.group_contains(RolloutClosed, match="closed while this request was in flight")


async def test_a_generation_that_is_cancelled_as_its_transport_closes_is_cancelled() -> None:
    async def cancel_and_close(transport: HttpTransport, waits: trio.CancelScope) -> None:
        waits.cancel()
        await transport.aclose()

    waits = await generation_over_a_transport_that_closes(cancel_and_close)
    assert waits.cancelled_caught


# --- servers that misbehave --------------------------------------------------------------------


class Liar:
    """A real HTTP server whose answer to a generation is a script; everything else is well."""

    def __init__(self, answer: bytes, *, close: bool = False) -> None:
        self.answer = answer
        self.close = close
        self.generations = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                more = await stream.receive_some(65536)
                if not more:
                    return
                buffer += more
            head, buffer = buffer.split(b"\r\n\r\n", 1)
            length = 0
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            while len(buffer) < length:
                buffer += await stream.receive_some(65536)
            buffer = buffer[length:]
            method, path = head.split(b" ")[:2]
            if method == b"POST" and path == b"/v1/completions":
                self.generations += 1
                await stream.send_all(self.answer)
                if self.close:
                    await stream.aclose()
                    return
            elif path == b"/v1/models":
                await stream.send_all(http(b'{"object":"list","data":[{"id":"tiny"}]}'))
            elif path == b"/health":
                await stream.send_all(http(b""))
            else:
                await stream.send_all(http(b'{"detail":"Not Found"}', 404))


def http(body: bytes, status: int = 200, kind: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (status, kind, len(body)) + body


COMPLETION = (
    b'{"id":"x","object":"text_completion","model":"tiny","choices":[{"index":0,"text":"",'
    b'"logprobs":{"token_logprobs":[%s],"tokens":[%s]},"finish_reason":"%s","stop_reason":null,'
    b'"token_ids":[%s]}]}'
)


@pytest.mark.parametrize(
    ("answer", "close", "error"),
    [
        (http(b"<html>502 Bad Gateway</html>", 200, b"text/html"), False, ProtocolError),
        (http(b"<html>502 Bad Gateway</html>", 502, b"text/html"), False, ServerError),
        (http(b'{"choices":[{"tok'), False, ProtocolError),
        (http(b'{"error":{"message":"no","type":"x","code":500}}', 500), False, ServerError),
        (http(b'{"error":{"message":"no","type":"x","code":400}}', 400), False, RequestRejected),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{", True, TransportError),
        (b"", True, TransportError),
        (b"this is not HTTP at all\r\n\r\n", True, ArealTrioError),
        (http(COMPLETION % (b"-1.0", b'"token_id:5"', b"length", b"5,6")), False, ProtocolError),
        (http(COMPLETION % (b"NaN", b'"token_id:5"', b"length", b"5")), False, ProtocolError),
    ],
    ids=[
        "HTML with 200",
        "HTML with 502",
        "truncated JSON",
        "500",
        "400",
        "body cut short",
        "closed without a word",
        "not HTTP",
        "lists of unequal length",
        "NaN",
    ],
)
async def test_a_bad_answer_is_one_classed_error_and_the_slot_comes_back(
    answer: bytes, close: bool, error: type[ArealTrioError]
) -> None:
    liar = Liar(answer, close=close)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, liar.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        config = RolloutConfig(servers=[f"http://127.0.0.1:{port}"], max_failovers=1)
        async with open_engine(config) as engine:
            with pytest.raises(error) as caught:
                await engine.agenerate(ModelRequest(PROMPT, GREEDY))
            assert "token_ids" not in str(caught.value)  # no payload
            assert len(str(caught.value)) < 500
            assert [row.outstanding for row in engine.statistics()] == [0]
        assert liar.generations == (1 if error is RequestRejected else 2)
        nursery.cancel_scope.cancel()


async def test_an_answer_above_the_configured_size_is_refused() -> None:
    liar = Liar(http(b" " * 2000))
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, liar.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        config = RolloutConfig(servers=[f"http://127.0.0.1:{port}"], response_size_bytes=1999)
        async with open_engine(config) as engine:
            with pytest.raises(ResponseTooLarge):
                await engine.agenerate(ModelRequest(PROMPT, GREEDY))
        nursery.cancel_scope.cancel()
    assert liar.generations == 1


async def test_more_tokens_than_asked_for_break_the_protocol() -> None:
    many = b",".join(b"5" for _ in range(41))
    logprobs = b",".join(b"-1.0" for _ in range(41))
    tokens = b",".join(b'"token_id:5"' for _ in range(41))
    liar = Liar(http(COMPLETION % (logprobs, tokens, b"length", many)))
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, liar.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        config = RolloutConfig(servers=[f"http://127.0.0.1:{port}"], max_failovers=0)
        async with open_engine(config) as engine:
            with pytest.raises(ProtocolError, match="41 tokens"):
                await engine.agenerate(ModelRequest(PROMPT, GREEDY))
        nursery.cancel_scope.cancel()


async def test_without_a_report_the_pinned_version_stands_and_is_exact_only_without_an_update() -> (
    None
):
    liar = Liar(http(COMPLETION % (b"-1.0", b'"token_id:5"', b"stop", b"5")))
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, liar.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        async with open_engine(RolloutConfig(servers=[f"http://127.0.0.1:{port}"])) as engine:
            quiet = await engine.agenerate(ModelRequest(PROMPT, GREEDY))
            assert quiet.output_versions.tolist() == [0]
            assert quiet.versions_exact
            (server,) = engine.pool.servers
            parse = engine.pool.dialect.parse_generate

            def land_an_update(*args: Any, **kwargs: Any) -> object:
                server.version = 1  # while the answer was on its way
                return parse(*args, **kwargs)

            class Late:
                def __getattr__(self, name: str) -> object:
                    if name == "parse_generate":
                        return land_an_update
                    return getattr(make_dialect("vllm"), name)

            engine.pool.dialect = Late()  # type: ignore[assignment]
            late = await engine.agenerate(ModelRequest(PROMPT, GREEDY))
            assert late.output_versions.tolist() == [0]
            assert not late.versions_exact
        nursery.cancel_scope.cancel()


# --- joining -------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_named_within_the_setup_time() -> None:
    address = "http://127.0.0.1:9"
    config = RolloutConfig(servers=[address], setup_timeout_s=0.5)
    with pytest.raises(NoServerAvailable, match=address):
        async with open_engine(config):
            raise AssertionError("it opened")


async def test_a_server_that_answers_html_to_health_is_refused_or_named() -> None:
    async def page(stream: trio.SocketStream) -> None:
        while await stream.receive_some(65536):
            await stream.send_all(http(b"<html>hello</html>", 200, b"text/html"))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, page, 0)
        address = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        config = RolloutConfig(servers=[address], setup_timeout_s=5)
        with pytest.raises(NoServerAvailable, match="not usable"):
            async with open_engine(config):
                raise AssertionError("it opened")
        nursery.cancel_scope.cancel()


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match="backend"):
        make_dialect("tgi")


__all__ = ["Fleet"]
