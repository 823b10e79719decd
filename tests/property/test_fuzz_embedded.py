"""The embedded servers: any request is answered 2xx, or refused in the dialect's own words.

Nothing that a client sends ends a handler with an exception, and nothing that it did not ask for
stays in the scheduler. What vLLM itself answers with a 500 (a worker's method that failed) is the
one 500 there is, and has its shape.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from arealtrio.embedded.engine import Engine
from arealtrio.embedded.scheduler import Scheduler
from arealtrio.embedded.settings import DialectName, ServerSettings
from arealtrio.embedded.sglang_app import sglang_app
from arealtrio.embedded.vllm_app import vllm_app
from arealtrio.testing.asgi import ask
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse
from arealtrio.wire.dialect import Dialect, SegmentRequest, SegmentResponse, ServerInfo
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

from ..models.embedded import VOCAB_SIZE, CountingModel
from .fuzzing import bodies, cut_places, json_values, pieces, written

PATHS: dict[str, Dialect] = {"vllm": VllmDialect(), "sglang": SglangDialect()}
RPC = ("/collective_rpc", "/init_weight_transfer_engine", "/update_weights",
       "/finish_weight_update")  # fmt: skip

dialects = pytest.mark.parametrize("name", ["vllm", "sglang"])


def load_nothing(path: Path) -> CountingModel:
    if path.name != "w":
        raise FileNotFoundError(f"no weights.npz in {path}")
    return CountingModel(1)


class InlineEngine(Engine):
    """An engine that reads weights without a thread, so that who is blocked waits for others."""

    async def _read(self, path: Path) -> CountingModel:
        return load_nothing(path)


class Server:
    """A server in memory that answers as fast as it can."""

    def __init__(self, name: DialectName, engine: Engine, app: Starlette) -> None:
        self.name, self.engine, self.app = name, engine, app
        self.was_paused = False

    async def ask(self, request: HttpRequest) -> HttpResponse | None:
        """The answer; None where it waits for the end of a pause, and was given up."""
        self.was_paused |= "pause" in request.path or "sleep" in request.path
        answer = None

        async def asking() -> None:
            nonlocal answer
            answer = await ask(self.app, request)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert answer is not None or self.was_paused, f"{request.path} was not answered"
        return answer


@asynccontextmanager
async def serving(name: DialectName) -> AsyncIterator[Server]:
    scheduler = Scheduler(CountingModel(), max_num_seqs=4, max_model_len=24)
    engine = InlineEngine(scheduler, load_nothing)
    made = ServerSettings(weights=Path("w"), dialect=name, max_num_seqs=4, max_model_len=24)
    app = {"vllm": vllm_app, "sglang": sglang_app}[name](engine, made)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield Server(name, engine, app)
        nursery.cancel_scope.cancel()


def in_trio(name: DialectName, play: Callable[[Server], Any]) -> None:
    async def main() -> None:
        async with serving(name) as server:
            await play(server)

    trio.run(main)


def check_answer(server: Server, request: HttpRequest, answer: HttpResponse | None) -> None:
    if answer is None or 200 <= answer.status < 300:
        return
    words = f"{request.method} {request.path}: {answer.status} {answer.body[:200]!r}"
    path = request.path.partition("?")[0]
    assert 400 <= answer.status < 600, words
    if answer.status >= 500:
        dead = server.engine.scheduler.state == "dead"
        assert dead or (server.name == "vllm" and path in RPC), words
    if not answer.body:
        assert dead
        return
    try:
        refusal = json.loads(answer.body)
    except ValueError:
        assert path == "/flush_cache", words  # in plain text, as in SGLang
        return
    fields = ("error", "message", "detail", "success", "error_message")
    assert isinstance(refusal, dict), words
    assert any(name in refusal for name in fields), words


ROUTES: dict[str, list[tuple[str, Any]]] = {
    "vllm": [
        ("/v1/completions", {
            "model": "tiny", "prompt": [1, 2], "max_tokens": 3, "min_tokens": 1, "temperature": 1,
            "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 3, "stop_token_ids": [4], "n": 1,
            "logit_bias": {"3": 1.5}, "logprobs": 1, "presence_penalty": 0.5,
            "frequency_penalty": 0.5, "repetition_penalty": 1.5, "ignore_eos": True,
            "stream": False, "stream_options": {"include_usage": True}, "request_id": "r",
            "return_token_ids": True, "return_tokens_as_token_ids": True}),
        ("/inference/v1/generate", {
            "token_ids": [1, 2], "request_id": "r", "stream": False,
            "sampling_params": {"max_tokens": 3, "logprobs": 0, "seed": 2, "n": 1,
                                "stop_token_ids": [4], "logit_bias": {"3": 1.5}}}),
        ("/v1/chat/completions", {
            "messages": [{"role": "user", "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}],
            "max_tokens": 3, "logprobs": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True}),
        ("/abort_requests", {"request_ids": ["r"]}),
        ("/inference/v1/abort_requests", {"request_ids": ["r"]}),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "w"}}),
        ("/update_weight_version", {"new_version": "3"}),
        ("/init_weight_transfer_engine", {"init_info": {
            "master_address": "a", "master_port": 1, "rank_offset": 1, "world_size": 2}}),
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": {
            "names": ["a"], "dtype_names": ["int8"], "shapes": [[1, 2]]}}),
        ("/update_weights", {"update_info": {"path": "w"}}),
        ("/finish_weight_update", {"weight_version": "3"}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/", "load_inplace": True}),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ],
    "sglang": [
        ("/generate", {
            "rid": "r", "input_ids": [1, 2], "return_logprob": True, "stream": False,
            "lora_path": None, "sampling_params": {
                "max_new_tokens": 3, "min_new_tokens": 1, "temperature": 1, "top_p": 0.9,
                "top_k": 3, "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": 0.5,
                "repetition_penalty": 1.5, "ignore_eos": True, "stop_token_ids": [4],
                "sampling_seed": 3, "logit_bias": {"3": 1.5}, "n": 1}}),
        ("/generate", {"input_ids": [[1, 2], [3]], "rid": ["r", "s"],
                       "sampling_params": [{"max_new_tokens": 2}, {"max_new_tokens": 1}]}),
        ("/abort_request", {"rid": "r", "abort_all": False}),
        ("/pause_generation", {"mode": "retract"}),
        ("/continue_generation", {}),
        ("/flush_cache", {}),
        ("/update_weights_from_disk", {
            "model_path": "w", "weight_version": "3", "flush_cache": True,
            "abort_all_requests": False}),
        ("/update_weight_version", {"new_version": "3", "abort_all_requests": False}),
        ("/init_weights_update_group", {
            "master_address": "a", "master_port": 1, "rank_offset": 1, "world_size": 2,
            "group_name": "g", "backend": "nccl"}),
        ("/begin_weight_update", {}),
        ("/update_weights_from_distributed", {
            "names": ["a"], "dtypes": ["int8"], "shapes": [[1, 2]], "group_name": "g"}),
        ("/end_weight_update", {}),
        ("/destroy_weights_update_group", {"group_name": "g"}),
        ("/load_lora_adapter", {"lora_name": "a", "lora_path": "/"}),
        ("/unload_lora_adapter", {"lora_name": "a"}),
        ("/release_memory_occupation", {"tags": ["weights"]}),
        ("/resume_memory_occupation", {"tags": ["weights"]}),
    ],
}  # fmt: skip
QUERIES = {
    "vllm": ["/pause?mode=keep", "/pause?mode=wait", "/resume", "/sleep?level=1",
             "/wake_up?tags=weights", "/reset_prefix_cache?reset_running_requests=true"],
    "sglang": ["/pause_generation", "/continue_generation", "/flush_cache?timeout=1"],
}  # fmt: skip
ASKED = {
    "vllm": ["/health", "/metrics", "/v1/models", "/version", "/weight_info", "/is_paused",
             "/is_sleeping", "/server_info?config_format=json", "/server_info", "/load"],
    "sglang": ["/health", "/metrics", "/v1/models", "/model_info", "/server_info"],
}  # fmt: skip


@st.composite
def requests(draw: st.DrawFn, name: str) -> HttpRequest:
    """Mostly a right body, damaged; sometimes any body, a damaged query, or a look."""
    match draw(st.sampled_from(["body", "body", "body", "body", "query", "look", "any"])):
        case "body":
            path, body = draw(st.sampled_from(ROUTES[name]))
            return HttpRequest("POST", path, draw(bodies([body])))
        case "query":
            path = draw(st.sampled_from(QUERIES[name]))
            key, _, value = path.partition("=")
            change = st.text(st.characters(codec="utf-8"), max_size=6).map(quote)
            given_value = draw(st.sampled_from([value, "", "-1", "1e999", "%ff%00"]) | change)
            return HttpRequest("POST", f"{key}={given_value}" if value else path)
        case "look":
            return HttpRequest("GET", draw(st.sampled_from(ASKED[name])))
    path, _ = draw(st.sampled_from(ROUTES[name]))
    return HttpRequest("POST", path, written(draw(json_values)))


@dialects
@settings(max_examples=3 * settings().max_examples)
@given(data=st.data())
def test_any_requests_are_answered_or_refused_in_the_dialect_s_words(
    name: Any, data: st.DataObject
) -> None:
    asked = data.draw(st.lists(requests(name), min_size=1, max_size=5))

    async def play(server: Server) -> None:
        for request in asked:
            check_answer(server, request, await server.ask(request))
        for path in ("/metrics", "/v1/models"):  # whatever names it was given
            answer = await server.ask(HttpRequest("GET", path))
            assert answer is not None
            assert answer.status == 200
        assert not server.engine.scheduler.running
        assert not server.engine.scheduler.waiting

    in_trio(name, play)


@dialects
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud800"', b"\xff", b"1" * 5000, b"NaN", b"[]", b"0"],
    ids=lambda body: repr(body[:8]),
)
def test_no_body_ends_a_handler(name: Any, body: bytes) -> None:
    async def play(server: Server) -> None:
        for path, _ in ROUTES[name]:
            request = HttpRequest("POST", path, body)
            answer = await server.ask(request)
            check_answer(server, request, answer)

    in_trio(name, play)


LONG, NUL = "x" * 5000, "a\0b"
FOUND: list[tuple[str, str, Any]] = [
    ("vllm", "/collective_rpc", {"method": "reload_weights", "kwargs": True}),
    ("vllm", "/collective_rpc", {"method": ["reload_weights"]}),
    ("vllm", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": LONG}}),
    ("vllm", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": NUL}}),
    ("vllm", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": LONG}),
    ("vllm", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": NUL}),
    ("vllm", "/v1/completions", {"prompt": [1], "n": 1e300}),
    ("vllm", "/v1/completions", {"prompt": [1], "seed": 10**400}),
    ("vllm", "/v1/completions", {"prompt": [1], "seed": "9" * 4000}),
    ("vllm", "/v1/completions", {"prompt": [1], "temperature": 10**400}),
    ("vllm", "/v1/completions", {
        "prompt": [1], "temperature": 5e-324, "repetition_penalty": 5e-324}),
    ("vllm", "/v1/completions", {
        "prompt": [1], "repetition_penalty": 1e308, "logit_bias": {"1": 1e308}}),
    ("vllm", "/v1/completions", {"prompt": [1], "logit_bias": {"1": 10**400}}),
    ("vllm", "/v1/chat/completions", {"messages": [{}]}),
    ("vllm", "/v1/chat/completions", {"messages": [{"role": 1, "content": [[]]}]}),
    ("vllm", "/v1/chat/completions", {"messages": 5}),
    ("sglang", "/load_lora_adapter", {"lora_name": "a", "lora_path": LONG}),
    ("sglang", "/load_lora_adapter", {"lora_name": "a", "lora_path": NUL}),
    ("sglang", "/update_weights_from_disk", {"model_path": LONG}),
    ("sglang", "/update_weights_from_disk", {"model_path": NUL}),
    ("sglang", "/generate", {"input_ids": [1], "sampling_params": {"temperature": 10**400}}),
    ("sglang", "/generate", {"input_ids": [1], "sampling_params": {"sampling_seed": 10**400}}),
    ("sglang", "/generate", {"input_ids": [1], "sampling_params": {"logit_bias": {"1" * 5000: 1}}}),
    ("sglang", "/generate", {"input_ids": [1], "sampling_params": {"logit_bias": {"\u00b2": 1}}}),
    ("sglang", "/generate", {"input_ids": [10**400]}),
    ("sglang", "/generate", {"input_ids": [[1], 2]}),
    ("sglang", "/generate", {"input_ids": [1], "image_data": [5]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "body"), FOUND, ids=lambda value: repr(value)[:40])
def test_what_once_ended_a_handler_or_might(name: Any, path: str, body: Any) -> None:
    request = HttpRequest("POST", path, written(body))

    async def play(server: Server) -> None:
        check_answer(server, request, await server.ask(request))

    in_trio(name, play)


# --- round trips -----------------------------------------------------------------------------

segments = st.builds(
    SegmentRequest,
    request_id=st.from_regex(r"\A[!-~]{1,8}\Z"),
    token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12).map(
        lambda ids: np.array(ids, dtype=np.int32)
    ),
    max_new_tokens=st.integers(1, 10),
    gconfig=st.builds(
        GenerationHyperparameters,
        temperature=st.floats(0, 4),
        greedy=st.booleans(),
        top_p=st.floats(0.1, 1),
        top_k=st.integers(1, 10) | st.just(10**8),
        min_p=st.floats(0, 0.9),
        frequency_penalty=st.floats(-2, 2),
        presence_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.1, 2),
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
    ),
    seed=st.none() | st.integers(0, 2**62),
)
infos = st.sampled_from([ServerInfo(), ServerInfo(token_in_token_out=True)])


@dialects
@given(segment=segments, info=infos, cuts=cut_places)
def test_what_the_codec_asks_the_server_answers_and_the_codec_reads(
    name: Any, segment: SegmentRequest, info: ServerInfo, cuts: list[int]
) -> None:
    dialect: Dialect = PATHS[name]

    async def play(server: Server) -> None:
        whole, streamed = [
            await server.ask(dialect.generate(segment, info, stream=stream))
            for stream in (False, True)
        ]
        assert whole is not None
        assert streamed is not None
        read = dialect.parse_generate(whole, info)
        parser = dialect.stream_parser()
        for piece in pieces(streamed.body, cuts):
            parser.feed(piece)
        for answer in (read, parser.answer()):
            check_made(answer, segment)

    in_trio(name, play)


def check_made(answer: SegmentResponse, segment: SegmentRequest) -> None:
    """The tokens are those that the model makes of the prompt, as far as chance allows."""
    assert 1 <= len(answer.token_ids) <= segment.max_new_tokens
    assert answer.stop_reason in ("stop", "length")
    assert (answer.token_ids < VOCAB_SIZE).all()
    assert np.isfinite(answer.logprobs).all()
    if answer.versions:
        assert answer.versions[-1].end == len(answer.token_ids)
    if len(answer.token_ids) < segment.max_new_tokens:
        stops = {*segment.gconfig.stop_token_ids, 0}
        assert int(answer.token_ids[-1]) in stops
