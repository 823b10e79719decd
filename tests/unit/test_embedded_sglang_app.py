"""The embedded server over real HTTP, against what a real SGLang answered."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from starlette.routing import Route

from arealtrio.embedded.engine import Engine
from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.scheduler import Scheduler
from arealtrio.embedded.settings import ServerSettings
from arealtrio.embedded.sglang_app import sglang_app
from arealtrio.embedded.sglang_gate import Gate
from arealtrio.embedded.sglang_weights import NO_SESSION, NOT_FLUSHED
from arealtrio.embedded.tensors import Tensor
from arealtrio.errors import RequestRejected
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse, as_token_ids
from arealtrio.wire.dialect import SegmentRequest, ServerInfo, VersionSpan
from arealtrio.wire.sglang import SglangDialect

from ..golden.exchange import answer, body_of, question
from .embedded_server import PROMPT, Line, events, keys, open_line

SERVER = "sglang-0.5.23"
GOLDEN = Path(__file__).parents[1] / "golden" / SERVER
CONTEXT = 4096  # as in the recordings
COUNT = 900
ENDLESS = {"ignore_eos": True, "max_new_tokens": COUNT, "temperature": 0}
LONG = {"input_ids": PROMPT, "sampling_params": ENDLESS, "return_logprob": True}


@pytest.fixture
async def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    async with opened(tmp_path, monkeypatch) as line:
        yield line


def opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AbstractAsyncContextManager[Line]:
    return open_line(tmp_path, monkeypatch, dialect="sglang", max_model_len=CONTEXT, **settings)


async def replay(line: Line, name: str) -> httpx.Response:
    """Send a recorded request to our server, with our weights where it names the recorded ones."""
    asked = question(SERVER, f"{name}.json")
    body = asked["json"]
    if str((body or {}).get("model_path", "")).startswith("models/tiny-"):
        body = {**body, "model_path": str(line.weights[2])}
    return await line.client.request(
        asked["method"], asked["path"], **({} if body is None else {"json": body})
    )


async def ask(line: Line, **sampling: Any) -> Any:
    return await line.ok("/generate", {**LONG, "sampling_params": sampling})


async def label(line: Line) -> str:
    return str((await line.client.get("/model_info")).json()["weight_version"])


class Stream:
    """A long answer in the making."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.events: list[Any] = []

    async def run(self, line: Line, rid: str = "long") -> None:
        lines = []
        body = {**LONG, "rid": rid, "stream": True}
        async with line.client.stream("POST", "/generate", json=body) as response:
            async for one in response.aiter_lines():
                lines.append(one)
                self.started.set()
        self.events = events(lines)

    @property
    def last(self) -> Any:
        return self.events[-1]


class Knocks:
    """Counts the requests that came to the gate, where nothing else shows them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._changed = trio.Event()
        original = Gate.try_to_enter

        def try_to_enter(gate: Gate) -> bool:
            self._count += 1
            self._changed.set()
            self._changed = trio.Event()
            return original(gate)

        monkeypatch.setattr(Gate, "try_to_enter", try_to_enter)

    async def wait(self, count: int) -> None:
        while self._count < count:
            await self._changed.wait()


@pytest.mark.parametrize("name", ["err_bad_temp", "err_no_input", "err_too_long"])
async def test_an_error_is_word_for_word_that_of_sglang(line: Line, name: str) -> None:
    response = await replay(line, name)
    assert response.status_code == answer(SERVER, f"{name}.json").status
    assert response.json() == body_of(SERVER, f"{name}.json")


@pytest.mark.parametrize(
    "name",
    [
        "abort_request", "abort_request_all", "continue_generation_abort",
        "continue_generation_in_place", "continue_generation_retract", "flush_cache", "health",
        "health_generate", "pause_generation_abort", "pause_generation_in_place",
        "pause_generation_retract", "update_weights_from_disk",
        "update_weights_while_paused_in_place",
    ],
)  # fmt: skip
async def test_a_command_is_answered_word_for_word(line: Line, name: str) -> None:
    response = await replay(line, name)
    recorded = answer(SERVER, f"{name}.json")
    assert response.status_code == recorded.status
    if recorded.headers.get("content-type") == "application/json":
        assert response.json() == msgspec.json.decode(recorded.body)
    else:
        assert response.content == recorded.body


@pytest.mark.parametrize(
    "name",
    ["err_update_weights_bad", "generate", "greedy_t1", "ignore_eos", "models", "stop_token",
     "tps1"],
)  # fmt: skip
async def test_an_answer_has_the_keys_of_sglangs(line: Line, name: str) -> None:
    response = await replay(line, name)
    assert response.status_code == answer(SERVER, f"{name}.json").status
    expected, ours = keys(body_of(SERVER, f"{name}.json")), keys(response.json())
    for one in (ours, expected):  # our model ends elsewhere
        one.get("meta_info", {}).pop("finish_reason", None)
    assert ours == expected


@pytest.mark.parametrize("name", ["model_info", "get_model_info", "server_info"])
async def test_what_it_says_of_itself_is_a_part_of_what_sglang_says(line: Line, name: str) -> None:
    ours = (await replay(line, name)).json()
    theirs = body_of(SERVER, f"{name}.json")
    assert set(ours) <= set(theirs)
    for key, value in ours.items():
        assert theirs[key] is None or type(value) is type(theirs[key]), key


async def test_our_own_codec_understands_it(line: Line) -> None:
    dialect = SglangDialect()

    async def send(request: HttpRequest) -> HttpResponse:
        response = await line.client.request(
            request.method, request.path, content=request.body, headers=list(request.headers)
        )
        return HttpResponse(response.status_code, dict(response.headers), response.content)

    commands = [dialect.pause("keep"), *dialect.load_weights(str(line.weights[2]), 7),
                dialect.resume(), dialect.abort("nobody", ServerInfo())]  # fmt: skip
    for request in commands:
        dialect.parse_control(await send(request))
    info = dialect.parse_discover([await send(request) for request in dialect.discover()])
    assert (info.model, info.max_model_len, info.max_concurrency) == ("tiny", CONTEXT, 8)
    assert (info.weight_version, info.token_in_token_out) == (7, True)
    segment = SegmentRequest(
        request_id="one",
        token_ids=as_token_ids(PROMPT),
        max_new_tokens=5,
        gconfig=GenerationHyperparameters(ignore_eos=True),
    )
    generated = dialect.parse_generate(await send(dialect.generate(segment, info)), info)
    assert len(generated.token_ids) == 5
    assert generated.versions == (VersionSpan(7, 0, 5),)
    load = dialect.parse_load(await send(dialect.load()))
    assert (load.running, load.waiting, load.requests_finished) == (0, 0, 1)
    dialect.parse_health(await send(dialect.health()))
    (bad,) = dialect.load_weights("/nowhere", 8)
    with pytest.raises(RequestRejected, match="Failed to get weights"):
        dialect.parse_control(await send(bad))


async def test_greedy_tokens_are_the_models_own(line: Line) -> None:
    told = await ask(line, max_new_tokens=6, temperature=0, ignore_eos=True)
    model = TinyModel.load(line.weights[1])
    expected = list(PROMPT)
    for _ in range(6):
        expected.append(int(model.next_logits([expected])[0].argmax()))
    assert told["output_ids"] == expected[5:]
    pairs = told["meta_info"]["output_token_logprobs"]
    assert [pair[1:] for pair in pairs] == [[token_id, None] for token_id in expected[5:]]
    own = model.logprobs(as_token_ids(expected), len(PROMPT))
    assert [pair[0] for pair in pairs] == pytest.approx(own.tolist(), abs=1e-4)


async def test_eos_and_stop_ids_are_matched_and_kept(line: Line) -> None:
    told = await ask(line, logit_bias={"2": 100.0})
    assert told["output_ids"] == [2]
    assert told["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
    told = await ask(line, logit_bias={"9": 100.0}, stop_token_ids=[9])
    assert told["output_ids"] == [9]
    assert told["meta_info"]["finish_reason"] == {"type": "stop", "matched": 9}


async def test_ignoring_eos_ignores_stop_ids_too(line: Line) -> None:
    bias = {"9": 100.0}
    told = await ask(line, logit_bias=bias, stop_token_ids=[9], ignore_eos=True, max_new_tokens=4)
    assert told["output_ids"] == [9, 9, 9, 9]
    told = await ask(line, logit_bias=bias, stop_token_ids=[9], min_new_tokens=2, max_new_tokens=4)
    assert told["meta_info"]["completion_tokens"] == 3
    assert told["output_ids"][-1] == 9


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[3], []]}, "input_ids cannot be empty."),
        ({"input_ids": [3, "a"]}, "1 validation error"),
        ({"input_ids": [3], "rid": 1}, "1 validation error"),
        ({"input_ids": [[3], [4]], "rid": ["a"]}, "rids length mismatch"),
        ({"input_ids": [[3], [4]], "rid": ["a", "a"]}, "Duplicate request IDs detected within"),
        ({"input_ids": [371]}, "outside 0 … 370"),
        ({"input_ids": [3], "lora_path": "x"}, "never been loaded: x"),
        ({"input_ids": [3], "text": "hello"}, "text is not supported"),
        ({"input_ids": [3], "top_logprobs_num": 2}, "top_logprobs_num is not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_it_refuses(line: Line, body: Any, reason: str, stream: bool) -> None:
    response = await line.post("/generate", {**body, "stream": stream})
    in_stream = stream and "validation" not in reason
    assert response.status_code == (200 if in_stream else 400)
    if in_stream:
        (event,) = events(response.text.splitlines())
        assert reason in event["error"]["message"]
    else:
        told = response.json()
        assert reason in (told["error"]["message"] if "error" in told else told["message"])
    assert not line.scheduler.counters.submitted


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"top_p": 0}, "top_p must be in (0, 1], got 0."),
        ({"min_p": 2}, "min_p must be in [0, 1], got 2."),
        ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0."),
        ({"frequency_penalty": 3}, "frequency_penalty must be in [-2, 2], got 3."),
        ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2]"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "[0, max_new_tokens(8)], got 9."),
        ({"max_new_tokens": CONTEXT}, "You requested a total of 4101 tokens"),
        ({"logit_bias": {"371": 1.0}}, "logit_bias must has keys in [0, 370]"),
        ({"stop": ["a"]}, "stop is not supported"),
        ({"n": 2}, "n is not supported"),
    ],
)
async def test_parameters_it_refuses(line: Line, sampling: Any, reason: str) -> None:
    response = await line.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


async def test_a_batch_is_answered_in_its_order(line: Line) -> None:
    prompts = [[number + 3, 5] for number in range(12)]
    sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "rid": "many"}
    told = await line.ok("/generate", body)
    assert [one["meta_info"]["id"] for one in told] == [f"many_{i}" for i in range(12)]
    for prompt, one in zip(prompts, told, strict=True):
        alone = await line.ok("/generate", {**body, "input_ids": prompt})
        assert one["output_ids"] == alone["output_ids"]
    (last,) = {
        event["index"]: event
        for event in events(
            (
                await line.post("/generate", {**body, "input_ids": prompts[:1], "stream": True})
            ).text.splitlines()
        )
    }.values()
    assert last["output_ids"] == told[0]["output_ids"]


async def test_a_stream_has_the_keys_of_sglangs(line: Line) -> None:
    stream = Stream()
    await stream.run(line)
    theirs = events((GOLDEN / "generate_stream.txt").read_text().splitlines())
    assert len(stream.events) > 1
    assert keys(stream.events[0]) == keys(theirs[1])
    assert keys(stream.last) == keys(theirs[-1])


@pytest.mark.parametrize("incremental", [False, True])
async def test_a_stream_gives_the_tokens_of_a_whole_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incremental: bool
) -> None:
    settings = {"incremental_streaming_output": incremental}
    async with opened(tmp_path, monkeypatch, **settings) as line:
        whole = await line.ok("/generate", LONG)
        stream = Stream()
        await stream.run(line)
    tokens: list[int] = []
    pairs: list[Any] = []
    for event in stream.events:
        meta = event["meta_info"]
        tokens = event["output_ids"] if not incremental else tokens + event["output_ids"]
        fresh = meta["output_token_logprobs"]
        pairs = fresh if not incremental else pairs + fresh
        assert meta["completion_tokens"] == meta["output_token_logprobs_length"] == len(tokens)
        assert [pair[1] for pair in pairs] == tokens
    assert len(stream.events) > 1
    assert tokens == whole["output_ids"]
    assert pairs == whole["meta_info"]["output_token_logprobs"]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_update_while_paused_goes_on_with_the_new_weights(line: Line, mode: str) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        await line.ok("/pause_generation", {"mode": mode})
        made = line.scheduler.counters.generated_tokens
        body = {"model_path": str(line.weights[2]), "weight_version": "2",
                "flush_cache": mode == "retract"}  # fmt: skip
        told = await line.ok("/update_weights_from_disk", body)
        assert told["message"].endswith("Weight version updated to 2.")
        assert line.scheduler.counters.generated_tokens == made
        assert len(line.scheduler.running) == (0 if mode == "retract" else 1)
        await line.ok("/continue_generation", {})
    meta = stream.last["meta_info"]
    recorded = msgspec.json.decode((GOLDEN / f"spans_{mode}.json").read_bytes())["meta_info"]
    assert keys(meta) == keys(recorded)
    assert meta["num_retractions"] == recorded["num_retractions"]
    assert meta["weight_version"] == "2"
    assert meta["weight_versions"] == [
        {"version": "default", "start": 0, "end": made},
        {"version": "2", "start": made, "end": COUNT},
    ]
    assert stream.last["output_ids"] == greedy(line, made)


def greedy(line: Line, switch: int) -> list[int]:
    """The answer of a model whose weights are changed after ``switch`` tokens."""
    old, new = TinyModel.load(line.weights[1]), TinyModel.load(line.weights[2])
    tokens = list(PROMPT)
    for at in range(COUNT):
        tokens.append(int((old if at < switch else new).next_logits([tokens])[0].argmax()))
    return tokens[len(PROMPT) :]


async def test_a_cache_in_use_cannot_be_flushed(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        await line.ok("/pause_generation", {"mode": "in_place"})
        assert (await line.post("/flush_cache")).status_code == 400
        body = {"model_path": str(line.weights[2]), "weight_version": "2"}
        response = await line.post("/update_weights_from_disk", body)
        assert response.status_code == 400
        assert response.json()["message"] == NOT_FLUSHED
        assert await label(line) == "default"  # of the front end; the tokens know better
        await line.ok("/continue_generation", {})
    assert [span["version"] for span in stream.last["meta_info"]["weight_versions"]] == [
        "default", "2",
    ]  # fmt: skip


async def test_pause_abort_returns_what_is_there_and_the_next_waits_at_the_gate(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    knocks = Knocks(monkeypatch)
    stream, later = Stream(), Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        await line.ok("/pause_generation", {"mode": "abort"})
        nursery.start_soon(later.run, line, "later")
        await knocks.wait(2)
        await line.ok("/abort_request", {"rid": "later"})  # does not reach what waits there
        assert not line.scheduler.running
        assert not line.scheduler.waiting
        assert (await line.client.get("/health")).status_code == 200
        await line.ok("/continue_generation", {})
    told = stream.last
    assert told["meta_info"]["finish_reason"] == {
        "type": "abort", "message": "Aborted", "status_code": None, "err_type": None,
    }  # fmt: skip
    assert 0 < len(told["output_ids"]) < COUNT
    assert told["meta_info"]["weight_versions"][-1]["end"] == len(told["output_ids"])
    assert later.last["meta_info"]["finish_reason"] == {"type": "length", "length": COUNT}


async def test_loading_without_a_pause_waits_for_what_runs(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        body = {"model_path": str(line.weights[2]), "weight_version": "2"}
        await line.ok("/update_weights_from_disk", body)
        assert not line.scheduler.running
    assert [span["version"] for span in stream.last["meta_info"]["weight_versions"]] == ["default"]
    assert await label(line) == "2"


async def test_loading_may_abort_what_runs(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        body = {"model_path": str(line.weights[2]), "abort_all_requests": True}
        await line.ok("/update_weights_from_disk", body)
    assert stream.last["meta_info"]["finish_reason"]["type"] == "abort"
    assert await label(line) == "default"


async def test_a_bad_path_leaves_the_old_weights_in_service(line: Line) -> None:
    before = (await ask(line, max_new_tokens=6, temperature=0))["output_ids"]
    response = await replay(line, "err_update_weights_bad")
    told = response.json()
    assert (response.status_code, told["success"]) == (400, False)
    assert "/nope" in told["message"]
    assert (await line.client.get("/health")).status_code == 200
    assert (await ask(line, max_new_tokens=6, temperature=0))["output_ids"] == before
    assert await label(line) == "default"


async def test_a_label_alone_aborts_unless_told_not_to(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        body = {"new_version": "5", "abort_all_requests": False}
        told = await line.ok("/update_weight_version", body)
        assert told == {"success": True, "message": "Weight version updated to 5",
                        "new_version": "5"}  # fmt: skip
        assert len(line.scheduler.running) == 1
        await line.ok("/update_weight_version", {"new_version": "6"})
        assert not line.scheduler.running
    meta = stream.last["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert [span["version"] for span in meta["weight_versions"]] == ["default", "5"]
    assert await label(line) == "6"


async def test_abort_by_rid_compares_beginnings(line: Line) -> None:
    streams = {rid: Stream() for rid in ("a", "a-1", "b")}
    async with trio.open_nursery() as nursery:
        for rid, stream in streams.items():
            nursery.start_soon(stream.run, line, rid)
            await stream.started.wait()
        await line.ok("/pause_generation", {"mode": "in_place"})
        await line.ok("/abort_request", {"rid": ""})
        await line.ok("/abort_request", {"rid": "unknown"})
        assert len(line.scheduler.running) == 3
        await line.ok("/abort_request", {"rid": "a"})
        await line.ok("/continue_generation", {})
    ends = {rid: stream.last["meta_info"]["finish_reason"]["type"]
            for rid, stream in streams.items()}  # fmt: skip
    assert ends == {"a": "abort", "a-1": "abort", "b": "length"}


async def test_abort_of_what_never_ran_tells_little(line: Line) -> None:
    answers: list[Any] = []

    async def ask_one(rid: str) -> None:
        answers.append(await line.ok("/generate", {**LONG, "rid": rid}))

    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(ask_one, f"r{number}")
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 1)
        (queued,) = line.scheduler.waiting
        await line.ok("/abort_request", {"rid": queued.request_id})
        await line.ok("/abort_request", {"abort_all": True})
    told = next(one for one in answers if one["meta_info"]["id"] == queued.request_id)
    assert told["output_ids"] == []
    assert told["meta_info"]["finish_reason"] == {
        "type": "abort", "message": "Abort in waiting queue",
    }  # fmt: skip
    assert "weight_versions" not in told["meta_info"]


async def test_an_id_is_taken_until_its_answer_is_sent(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line, "twin")
        await stream.started.wait()
        response = await line.post("/generate", {"input_ids": PROMPT, "rid": "twin"})
        assert response.json() == {"error": {"message": "Duplicate request ID detected: twin"}}
        await line.ok("/abort_request", {"rid": "twin"})
    await line.ok("/generate", {"input_ids": PROMPT, "rid": "twin"})


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_takes_its_requests_along(line: Line, stream: bool) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(line.post, "/generate", {**LONG, "stream": stream})
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 2)
        await line.ok("/pause_generation", {"mode": "in_place"})
        nursery.cancel_scope.cancel()
    await line.watch.until(lambda scheduler: not scheduler.running and not scheduler.waiting)
    await line.ok("/continue_generation", {})
    await line.ok("/generate", {"input_ids": PROMPT})


GROUP = {"master_address": "127.0.0.1", "master_port": "29500", "rank_offset": 1,
         "world_size": 2, "backend": "nccl", "group_name": "g"}  # fmt: skip
TENSORS = {"names": ["w"], "dtypes": ["bfloat16"], "shapes": [[2, 3]], "group_name": "g",
           "abort_all_requests": True, "weight_version": "4"}  # fmt: skip


async def test_a_distributed_update_needs_a_session_and_a_group(line: Line) -> None:
    async def refused(path: str, body: Any) -> str:
        response = await line.post(path, body)
        assert response.status_code == 400, response.text
        return str(response.json()["message"])

    update = "/update_weights_from_distributed"
    assert await refused(update, TENSORS) == NO_SESSION
    assert "no weight-update session" in await refused("/end_weight_update", {})
    await line.ok("/begin_weight_update", {})
    assert "already open" in await refused("/begin_weight_update", {})
    assert "Group g not in []" in await refused(update, TENSORS)
    assert "rank_offset" in await refused("/init_weights_update_group", GROUP | {"rank_offset": 2})
    await line.ok("/init_weights_update_group", GROUP)
    assert "do not pair up" in await refused(update, TENSORS | {"dtypes": []})
    assert "1 validation error" in await refused(update, {"names": ["w"]})
    assert await label(line) == "default"
    await line.ok(update, TENSORS)
    await line.ok("/end_weight_update", {})
    await line.ok("/destroy_weights_update_group", {"group_name": "g"})
    assert "does not exist" in await refused("/destroy_weights_update_group", {})
    assert await label(line) == "4"
    assert line.server.announced == [Tensor("w", "bfloat16", (2, 3))]


async def test_adapters_are_names(line: Line, tmp_path: Path) -> None:
    adapter = {"lora_name": "x-v1", "lora_path": str(tmp_path)}
    told = await line.ok("/load_lora_adapter", adapter)
    assert told["loaded_adapters"] == {"x-v1": str(tmp_path)}
    await line.ok("/generate", {"input_ids": PROMPT, "lora_path": "x-v1"})
    cards = (await line.client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "x-v1"]
    for body in (adapter, {"lora_name": "y", "lora_path": "/nowhere"}):
        response = await line.post("/load_lora_adapter", body)
        assert (response.status_code, response.json()["success"]) == (400, False)
    await line.ok("/unload_lora_adapter", {"lora_name": "x-v1"})
    assert (await line.post("/unload_lora_adapter", {"lora_name": "x-v1"})).status_code == 400
    response = await line.post("/generate", {"input_ids": PROMPT, "lora_path": "x-v1"})
    assert response.status_code == 400


async def test_memory_is_released_by_tag_and_only_when_idle(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        assert (await line.post("/release_memory_occupation", {})).status_code == 400
        await line.ok("/pause_generation", {"mode": "retract"})
        assert await line.ok("/release_memory_occupation", {}) is None
        await line.ok("/resume_memory_occupation", {"tags": ["weights"]})
        response = await line.post("/resume_memory_occupation", {"tags": ["weights"]})
        assert "not released: weights" in response.json()["error"]["message"]
        await line.ok("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
        await line.ok("/continue_generation", {})
    assert stream.last["meta_info"]["finish_reason"]["type"] == "length"
    await line.ok("/release_memory_occupation", {"tags": ["kv_cache"]})
    response = await line.post("/generate", {"input_ids": PROMPT})
    assert "memory is released: kv_cache" in response.json()["error"]["message"]


async def test_a_fragile_server_dies_of_an_unknown_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, monkeypatch, fragile=True) as line:
        stream = Stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.run, line)
            await stream.started.wait()
            response = await line.post("/generate", {"input_ids": [371]})
            assert response.status_code == 500
        assert stream.last["error"]["code"] == 500
        with trio.fail_after(5):
            await line.server.stopped.wait()
        assert line.scheduler.state == "dead"


async def test_health_is_a_probe_that_a_pause_holds_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, monkeypatch, health_time_s=0.005) as line:
        assert (await line.client.get("/health")).status_code == 200
        await line.ok("/pause_generation", {"mode": "in_place"})
        assert (await line.client.get("/health")).status_code == 503
        await line.ok("/continue_generation", {})
        assert (await line.client.get("/health")).status_code == 200


async def test_logprobs_are_after_temperature_and_before_the_filters(line: Line) -> None:
    sampling = {"temperature": 0.5, "top_k": 2, "max_new_tokens": 1, "sampling_seed": 3}
    ((logprob, token_id, _),) = (await ask(line, **sampling))["meta_info"]["output_token_logprobs"]
    logits = (TinyModel.load(line.weights[1]).next_logits([PROMPT])[0] / 0.5).tolist()
    expected = logits[token_id] - math.log(sum(math.exp(x) for x in logits))
    assert logprob == pytest.approx(expected, abs=1e-4)


async def test_metrics_show_what_runs_and_what_waits(line: Line) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(11):
            nursery.start_soon(line.post, "/generate", LONG)
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 3)
        await line.ok("/pause_generation", {"mode": "in_place"})
        page = (await line.client.get("/metrics")).text
        await line.ok("/abort_request", {"abort_all": True})
        await line.ok("/continue_generation", {})
    rank = 'engine_type="unified",model_name="tiny",moe_ep_rank="0",pp_rank="0",tp_rank="0"'
    assert f"sglang:num_running_reqs{{{rank}}} 8.0\n" in page
    assert f"sglang:num_queue_reqs{{{rank}}} 3.0\n" in page
    assert "sglang:num_requests_total" not in page  # none is done
    recorded = (GOLDEN / "metrics.prom").read_text()
    ours = {one.split("{")[0] for one in page.splitlines() if one.startswith("sglang:")}
    assert all(f"\n{name}{{" in recorded for name in ours)


async def test_metrics_tell_of_retracted_requests_and_the_cache(line: Line) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.post, "/generate", LONG)
        await line.watch.until(lambda scheduler: scheduler.counters.generated_tokens > 1)
        await line.ok("/pause_generation", {"mode": "in_place"})
        (sequence,) = line.scheduler.running
        page = (await line.client.get("/metrics")).text
        assert value(page, "token_usage") == len(sequence.token_ids) / (8 * CONTEXT)
        await line.ok("/pause_generation", {"mode": "retract"})
        page = (await line.client.get("/metrics")).text
        assert (value(page, "num_retracted_reqs"), value(page, "token_usage")) == (1, 0)
        await line.ok("/abort_request", {"abort_all": True})


def value(page: str, name: str) -> float:
    (line,) = (one for one in page.splitlines() if one.startswith(f"sglang:{name}{{"))
    return float(line.rpartition(" ")[2])


def test_it_has_no_route_that_sglang_does_not_have(tmp_path: Path) -> None:
    recorded = {"/metrics": {"GET"}}  # a mounted application, which lists no routes
    for row in (GOLDEN / "routes.txt").read_text().splitlines():
        methods, path = row.split()
        recorded[path] = set(methods.split(","))
    engine = Engine(Scheduler(TinyModel.random(1)), TinyModel.load)
    for route in sglang_app(engine, ServerSettings(weights=tmp_path, dialect="sglang")).routes:
        assert isinstance(route, Route)
        assert route.methods is not None
        assert route.methods - {"HEAD"} == recorded[route.path], route.path


async def test_what_is_not_there(line: Line) -> None:
    response = await line.client.get("/nowhere")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})
    assert (await line.client.get("/generate")).status_code == 405
