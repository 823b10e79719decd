"""What an engine prefers, counts, sends along and warns of."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
import trustme

from arealtrio.config import RolloutConfig
from arealtrio.embedded.model import TinyModel, log_softmax
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import (
    ConfigError,
    NoServerAvailable,
    RequestRejected,
    ServerError,
    TransportError,
)
from arealtrio.servers import ServerPool
from arealtrio.tally import EngineStatistics
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    open_fleet,
)
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse, ModelRequest
from arealtrio.wire.sglang import SglangDialect

from .embedded_server import VOCAB_SIZE
from .fleet import connected_engine

SHORT = GenerationHyperparameters(max_new_tokens=10)


def session(name: str, tokens: int = 10) -> ModelRequest:
    return ModelRequest([5, 6], SHORT.new(max_new_tokens=tokens), session=name)


def shown(totals: EngineStatistics, *names: str) -> tuple[int, ...]:
    return tuple(getattr(totals, name) for name in names)


def affinity_of(engine: RemoteEngine) -> tuple[int, ...]:
    return shown(engine.totals(), "affinity_hits", "affinity_spills", "affinity_moves")


@asynccontextmanager
async def simulated(
    servers: int, length: int
) -> AsyncIterator[tuple[RemoteEngine, SimulatedFleet]]:
    async with (
        open_fleet(servers, lengths=FixedLengths(length)) as fleet,
        open_engine(RolloutConfig(servers=fleet.addresses), transport=fleet) as engine,
    ):
        yield engine, fleet


# --- affinity -----------------------------------------------------------------------------------


async def test_a_session_returns_to_its_server_though_others_have_less_to_do(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with simulated(3, 10) as (engine, _):
        answers = [await engine.agenerate(session("a")) for _ in range(5)]
        assert len({s.server for answer in answers for s in answer.segments}) == 1
        assert affinity_of(engine) == (4, 0, 0)
        without = [await engine.agenerate(ModelRequest([5], SHORT)) for _ in range(3)]
        assert len({s.server for answer in without for s in answer.segments}) == 3


async def test_a_full_home_is_not_waited_for_and_the_session_moves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    settings = [SimulatedServerSettings(max_num_seqs=1)] * 2
    async with open_fleet(settings, lengths=FixedLengths(100)) as fleet:
        config = RolloutConfig(servers=fleet.addresses)
        async with open_engine(config, transport=fleet) as engine, trio.open_nursery() as nursery:
            first = await engine.agenerate(session("a"))
            nursery.start_soon(engine.agenerate, session("a", 100))
            await trio.testing.wait_all_tasks_blocked(0.001)
            second = await engine.agenerate(session("a"))
            assert first.segments[0].server != second.segments[0].server
            assert second.wait_s == 0
            assert affinity_of(engine) == (1, 1, 1)
            third = await engine.agenerate(session("a"))
            assert third.segments[0].server == second.segments[0].server


async def test_a_session_whose_server_left_moves_without_a_spill(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with simulated(2, 10) as (engine, _):
        first = await engine.agenerate(session("a"))
        engine.pool.fleet.remove(first.segments[0].server)
        second = await engine.agenerate(session("a"))
        assert first.segments[0].server != second.segments[0].server
        assert affinity_of(engine) == (0, 0, 1)


async def test_affinity_can_be_off(autojump_clock: trio.testing.MockClock) -> None:
    async with open_fleet(2, lengths=FixedLengths(10)) as fleet:
        config = RolloutConfig(servers=fleet.addresses, affinity_size=0)
        async with open_engine(config, transport=fleet) as engine:
            answers = [await engine.agenerate(session("a")) for _ in range(2)]
            assert len({answer.segments[0].server for answer in answers}) == 2
            assert affinity_of(engine) == (0, 0, 0)


# --- counters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("segment_tokens", "kept", "again"), [(None, 0, 100), (20, 40, 20)])
async def test_a_death_costs_a_segment_at_most(
    segment_tokens: int | None, kept: int, again: int, autojump_clock: trio.testing.MockClock
) -> None:
    settings = [SimulatedServerSettings(token_time_s=0.01)] * 2
    async with open_fleet(settings, lengths=FixedLengths(100)) as fleet:
        config = RolloutConfig(servers=fleet.addresses, segment_tokens=segment_tokens)
        async with open_engine(config, transport=fleet) as engine, trio.open_nursery() as nursery:
            nursery.start_soon(engine.agenerate, session("a", 100))
            await trio.sleep(0.505)  # in the third segment of twenty
            victim = next(server for server in fleet if server.generations)
            victim.die()
    totals = engine.totals()
    names = ("failovers", "tokens_generated", "tokens_kept", "tokens_regenerated", "tokens_lost")
    assert shown(totals, *names) == (1, 100, kept, again, 0)
    assert totals.aborts_sent == 1


async def test_a_server_that_got_nothing_has_nothing_to_make_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with simulated(2, 10) as (engine, fleet):
        await engine.agenerate(session("a"))
        next(s for s in fleet if s.most_generations).die()  # the session's home
        await engine.agenerate(session("a"))
        names = ("failovers", "tokens_regenerated", "aborts_sent")
        assert shown(engine.totals(), *names) == (1, 0, 0)


# --- headers and TLS ----------------------------------------------------------------------------


def test_a_servers_own_headers_win_and_none_is_shown() -> None:
    config = RolloutConfig(
        servers=["http://a:1", "http://b:1"],
        headers={"Authorization": "common-secret", "X-Team": "t"},
        server_headers={"http://a:1/": {"authorization": "own-secret"}},
    )
    assert config.headers_of("http://a:1") == (("X-Team", "t"), ("authorization", "own-secret"))
    assert config.headers_of("http://b:1") == (("Authorization", "common-secret"), ("X-Team", "t"))
    assert "secret" not in repr(config)
    assert config.secrets_of("http://a:1") == ("own-secret",)


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("Bearer sk-proj-0123456789==", ["sk-proj-0123456789==", "sk-proj-0123456789"]),
        ('Token token="abcdefgh12"', ['token="abcdefgh12"', "abcdefgh12"]),
        ("a=b; session=abcdefgh12; c=d", ["session=abcdefgh12;", "abcdefgh12"]),
        ("Key abc=defg", ["abc=defg"]),
        ("short", []),
    ],
)
def test_a_header_s_keys_are_found_in_whatever_it_names_them(value: str, keys: list[str]) -> None:
    config = RolloutConfig(servers=["http://a:1"], headers={"X": value})
    assert list(config.secrets_of("http://a:1")) == keys


def test_headers_that_are_no_text_are_refused_without_being_repeated() -> None:
    broken: Any = {"http://a:1": {"authorization": b"secret"}}
    with pytest.raises(ConfigError, match="both of them text") as caught:
        RolloutConfig(servers=["http://a:1"], server_headers=broken)
    assert "secret" not in str(caught.value)


class Recorder:
    """A transport in front of another that notes the headers of each request."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: dict[str, set[Any]] = {}

    async def request(
        self, base_url: str, request: HttpRequest, *args: Any, headers: Any = (), **more: Any
    ) -> HttpResponse:
        self.seen.setdefault(base_url, set()).add(tuple(headers))
        answer = await self.inner.request(base_url, request, *args, headers=headers, **more)
        assert isinstance(answer, HttpResponse)
        return answer

    def stream(self, base_url: str, *args: Any, headers: Any = (), **more: Any) -> Any:
        self.seen.setdefault(base_url, set()).add(tuple(headers))
        return self.inner.stream(base_url, *args, headers=headers, **more)

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.mark.parametrize("streaming", [False, True])
async def test_every_request_carries_its_servers_headers(
    streaming: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_fleet(2, lengths=FixedLengths(10)) as fleet:
        first, second = fleet.addresses
        config = RolloutConfig(
            servers=fleet.addresses, streaming=streaming, server_headers={first: {"x-key": "1"}}
        )
        recorder = Recorder(fleet)
        async with open_engine(config, transport=recorder) as engine:
            for _ in range(2):
                await engine.agenerate(ModelRequest([5], SHORT))
    assert recorder.seen == {first: {(("x-key", "1"),)}, second: {()}}


class Gateway(Recorder):
    """A gateway that from some time on lets nobody in, and says with which key."""

    shut = False
    refuses_as = "one piece"  # or an event, of a status of its own or in mid-stream

    async def request(
        self, base_url: str, request: HttpRequest, *args: Any, headers: Any = (), **more: Any
    ) -> HttpResponse:
        if not self.shut:
            return await super().request(base_url, request, *args, headers=headers, **more)
        key = dict(headers)["Authorization"].removeprefix("Bearer ")
        words = f"Incorrect API key {key}, or {key}x. It is of team t"
        body = json.dumps({"error": {"message": words, "code": 401}}).encode()
        return HttpResponse(401, {"content-type": "application/json"}, body)

    @asynccontextmanager
    async def stream(
        self, base_url: str, *args: Any, headers: Any = (), **more: Any
    ) -> AsyncIterator[Any]:
        answer = await self.request(base_url, *args, headers=headers, **more)
        status, kind, pieces = answer.status, "application/json", [answer.body]
        if self.refuses_as != "one piece":
            kind = "text/event-stream; charset=utf-8"
            event = b"data: %b\n\n" % answer.body
            pieces = [event[:60], event[60:]]  # through the key
        if self.refuses_as == "an event in mid-stream":
            status, kind = 200, "Text/Event-Stream"  # no case matters (RFC 9110 §8.3.1)
        chunks = partial(Pieces, pieces)
        yield SimpleNamespace(status=status, headers={"content-type": kind}, chunks=chunks)


class PoliteGateway:
    """One that refuses with 200, in words that repeat the key."""

    async def request(
        self, base_url: str, request: HttpRequest, *_: Any, headers: Any = (), **__: Any
    ) -> HttpResponse:
        await trio.lowlevel.checkpoint()
        words = f"no such key: {dict(headers)['Authorization']}"
        return HttpResponse(200, {}, json.dumps({"success": False, "message": words}).encode())


async def test_a_key_that_a_refusal_with_200_repeats_is_not_in_the_error() -> None:
    config = RolloutConfig(servers=["http://a:1"], headers={"Authorization": "sk-proj-0123456789"})
    transport: Any = PoliteGateway()
    pool = ServerPool(config, SglangDialect(), transport)
    with pytest.raises(ServerError, match=r"no such key: \*\*\*$"):
        await pool.control(pool.servers[0], HttpRequest("POST", "/pause_generation"), 1.0)


class Pieces:
    """A body. Not an async generator: those want closing."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration


@pytest.mark.parametrize(
    ("streaming", "refuses_as"),
    [
        (False, "one piece"),
        (True, "one piece"),
        (True, "an event"),
        (True, "an event in mid-stream"),
    ],
)
async def test_a_key_that_a_refusal_repeats_is_not_in_the_error(
    streaming: bool, refuses_as: str, autojump_clock: trio.testing.MockClock
) -> None:
    headers = {"Authorization": "Bearer sk-proj-0123456789", "X-Team": "t", "X-None": ""}
    async with open_fleet(1) as fleet:
        config = RolloutConfig(servers=fleet.addresses, streaming=streaming, headers=headers)
        gateway = Gateway(fleet)
        async with open_engine(config, transport=gateway) as engine:
            gateway.shut, gateway.refuses_as = True, refuses_as
            with pytest.raises(RequestRejected) as caught:
                await engine.agenerate(ModelRequest([5], SHORT))
    assert "Incorrect API key ***, or ***x. It is of team t" in str(caught.value)
    assert "sk-proj" not in "".join(traceback.format_exception(caught.value))


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    from arealtrio.transport import trust

    assert trust(None) is None
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=f"ca_file .*{name}"):
            trust(str(tmp_path / name))


async def test_an_https_server_is_checked_against_the_configured_authority(tmp_path: Path) -> None:
    ours, other = trustme.CA(), trustme.CA()
    for name, authority in (("ours.pem", ours), ("other.pem", other)):
        authority.cert_pem.write_to_path(tmp_path / name)
    context = ssl_context(ours)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve_tls, context)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        said = {}
        for name in ("ours.pem", "other.pem"):
            config = RolloutConfig(
                servers=[f"https://localhost:{port}"],
                ca_file=str(tmp_path / name),
                setup_timeout_s=0.5,
            )
            with pytest.raises(NoServerAvailable) as caught:
                async with open_engine(config):
                    pass
            said[name] = str(caught.value)
        nursery.cancel_scope.cancel()
    assert "teapot" in said["ours.pem"]
    assert "certificate" in said["other.pem"].lower()


def ssl_context(authority: trustme.CA) -> Any:
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


async def serve_tls(context: Any, task_status: trio.TaskStatus[Any]) -> None:
    """Answer everything with 418, which no client asks again."""

    head = b"HTTP/1.1 418 teapot\r\nconnection: close\r\ncontent-length: 6\r\n\r\n"

    async def answer(stream: Any) -> None:
        try:
            await stream.receive_some(4096)
            await stream.send_all(head + b"teapot")
        except trio.BrokenResourceError:
            return  # the client did not trust us

    await trio.serve_ssl_over_tcp(answer, 0, context, host="localhost", task_status=task_status)


# --- time ---------------------------------------------------------------------------------------


def test_the_limits_of_a_stream_are_named_and_within_the_whole() -> None:
    config = RolloutConfig(first_byte_timeout_s=7, idle_timeout_s=3, segment_timeout_s=5)
    streamed, whole = config.segment_limits(streamed=True), config.segment_limits()
    assert (streamed.connect_s, streamed.first_byte_s, streamed.idle_s, streamed.total_s) == (
        5, 5, 3, 5,
    )  # fmt: skip
    assert (whole.first_byte_s, whole.idle_s) == (5, 5)


# --- what a server says, and does not ------------------------------------------------------------


class Sglang:
    """An SGLang server that answers what is asked at the start, and nothing else."""

    async def request(
        self, base_url: str, request: HttpRequest, *_: Any, **__: Any
    ) -> HttpResponse:
        await trio.lowlevel.checkpoint()
        bodies = {"/v1/models": {"data": [{"id": "m"}]}, "/model_info": {"weight_version": "0"}}
        if request.path == "/server_info":
            return HttpResponse(404, {}, b"")
        return HttpResponse(200, {}, json.dumps(bodies.get(request.path, {})).encode())

    def stream(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_sglang_is_not_used_without_its_vocabularys_size() -> None:
    config = RolloutConfig(servers=["http://s:1"], backend="sglang")
    with pytest.raises(ConfigError, match=r"vocab_size=….*http://s:1"):
        async with open_engine(config, transport=Sglang()):
            pass
    async with open_engine(replace(config, vocab_size=100), transport=Sglang()) as engine:
        assert engine.statistics()[0].state == "ready"


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("tempered", "words"), [(False, "gives logprobs from before"), (None, "does not say")]
)
async def test_logprobs_of_another_distribution_are_warned_of_once(
    tempered: bool | None, words: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with simulated(1, 5) as (engine, _):
        server = engine.pool.servers[0]
        server.info = replace(server.info, logprobs_tempered=tempered)
        for harmless in (SHORT, SHORT.new(greedy=True, temperature=0.5)):
            with no_warning():
                await engine.agenerate(ModelRequest([5], harmless))
        with pytest.warns(UserWarning, match=words):
            await engine.agenerate(ModelRequest([5], SHORT.new(temperature=0.5)))
        with no_warning():
            await engine.agenerate(ModelRequest([5], SHORT.new(temperature=0.5)))


async def test_logprobs_after_the_temperature_need_no_warning(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with simulated(1, 5) as (engine, _):
        server = engine.pool.servers[0]
        server.info = replace(server.info, logprobs_tempered=True)
        with no_warning():
            await engine.agenerate(ModelRequest([5], SHORT.new(temperature=0.5)))


@pytest.mark.parametrize(
    ("dialect", "settings", "warned"),
    [
        ("vllm", {}, True),
        ("vllm", {"logprobs_mode": "processed_logprobs"}, False),
        ("sglang", {}, False),
    ],
)
async def test_what_a_servers_logprobs_are_of_is_what_it_says_and_what_they_are(
    dialect: str,
    settings: dict[str, Any],
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"vocab_size": VOCAB_SIZE}
    gconfig = GenerationHyperparameters(max_new_tokens=40, temperature=0.5, ignore_eos=True, seed=1)
    async with connected_engine(
        tmp_path, monkeypatch, config=config, dialect=dialect, **settings
    ) as (engine, fleet):
        with pytest.warns(UserWarning, match="before the temp") if warned else no_warning():
            answer = await engine.agenerate(ModelRequest([5, 6], gconfig))
    whole = np.concatenate([answer.input_tokens, answer.output_tokens])
    model = TinyModel.load(fleet.weights[1])
    logits = model.logits(model.contexts(whole, answer.input_len)) / (1.0 if warned else 0.5)
    expected = log_softmax(logits)[np.arange(40), answer.output_tokens]
    np.testing.assert_allclose(answer.output_logprobs, expected, atol=1e-4)


# --- caps under pressure ------------------------------------------------------------------------


async def test_a_server_whose_metrics_can_not_be_read_keeps_its_cap(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def load_of(self: ServerPool, server: Any) -> Any:
        nonlocal asked
        asked += 1
        await trio.lowlevel.checkpoint()
        raise TransportError("no metrics here")

    monkeypatch.setattr(ServerPool, "load_of", load_of)
    async with open_fleet(1) as fleet:
        config = RolloutConfig(servers=fleet.addresses, adaptive_caps=True, pressure_interval_s=1.0)
        async with open_engine(config, transport=fleet) as engine:
            await trio.sleep(5.5)
            assert asked == 5
            assert [(row.cap, row.allowed) for row in engine.statistics()] == [(8, 8)]
