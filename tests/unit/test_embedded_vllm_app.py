"""The embedded server over real HTTP, against what a real vLLM answered."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from arealtrio.embedded.model import TinyModel
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse, as_token_ids
from arealtrio.wire.dialect import SegmentRequest, VersionSpan
from arealtrio.wire.vllm import VllmDialect

from ..golden.exchange import body_of, question
from .embedded_server import ENDLESS, MAX_MODEL_LEN, PROMPT, Line, events, keys, open_line

SERVER = "vllm-0.32.0"
GOLDEN = Path(__file__).parents[1] / "golden" / SERVER


@pytest.fixture
async def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    async with open_line(tmp_path, monkeypatch) as line:
        yield line


async def replay(line: Line, name: str) -> httpx.Response:
    """Send a recorded request to our server."""
    asked = question(SERVER, name)
    return await line.client.request(
        asked["method"],
        asked["path"],
        params=asked["params"],
        headers=asked["headers"],
        **({} if asked["json"] is None else {"json": asked["json"]}),
    )


@pytest.mark.parametrize(
    "name",
    [
        "err_404", "err_405", "err_bad_temperature", "err_collective_rpc_no_method",
        "err_empty_prompt", "err_max_tokens_0", "err_missing_prompt", "err_pause_bad_mode",
        "err_prompt_too_long", "err_tito_out_of_vocab", "err_tito_unknown_model",
        "err_token_id_out_of_vocab", "err_too_many_logprobs", "err_unknown_model", "err_wrong_type",
        "generate_tito_probe",
    ],
)  # fmt: skip
async def test_an_error_is_word_for_word_that_of_vllm(line: Line, name: str) -> None:
    answer = await replay(line, f"{name}.json")
    recorded = msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes())["response"]
    assert answer.status_code == recorded["status"]
    assert answer.json() == recorded["body"]


@pytest.mark.parametrize(
    "name", ["err_negative_token", "err_not_json", "err_tito_empty", "err_collective_rpc_bad_path"]
)
async def test_an_error_has_the_shape_of_vllms(line: Line, name: str) -> None:
    if name == "err_not_json":
        answer = await line.client.post("/v1/completions", content=b"{nope")
    else:
        answer = await replay(line, f"{name}.json")
    recorded = msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes())["response"]
    assert answer.status_code == recorded["status"]
    theirs, ours = recorded["body"]["error"], answer.json()["error"]
    assert ours["type"] == theirs["type"]
    assert ours["code"] == theirs["code"]
    assert ours["message"]
    assert (ours["param"] is None) == (theirs["param"] is None)


@pytest.mark.parametrize(
    "name",
    [
        "abort_requests_all", "abort_requests_by_id", "completion_for_stop",
        "completion_for_stopstr", "completion_multi_prompt", "completion_n3",
        "completion_sampled_rl",
        "completion_token_ids_greedy", "err_prompt_plus_max_tokens", "err_unknown_field",
        "generate_tito", "generate_tito_abort", "generate_tito_logprobs_0",
        "generate_tito_no_logprobs", "generate_tito_unknown_sampling_param", "get_world_size",
        "health", "is_paused_0", "is_sleeping_0", "load", "models", "pause_abort_idle", "ping",
        "request_id_body", "reset_prefix_cache", "resume", "sleep_cpu", "update_weight_version",
        "version", "wake_up_cpu", "weight_info_0", "x_request_id",
    ],
)  # fmt: skip
async def test_an_answer_has_the_keys_of_vllms(line: Line, name: str) -> None:
    answer = await replay(line, f"{name}.json")
    recorded = msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes())["response"]
    assert answer.status_code == recorded["status"]
    ours = answer.json() if answer.content else ""
    assert keys(ours) == keys(recorded["body"])


@pytest.mark.parametrize(
    ("name", "path"),
    [("x_request_id", "id"), ("request_id_body", "id"), ("generate_tito_both_ids", "request_id"),
     ("generate_tito_x_request_id", "request_id"), ("generate_tito_request_id_body", "request_id")],
)  # fmt: skip
async def test_the_answers_id_is_made_as_vllm_makes_it(line: Line, name: str, path: str) -> None:
    answer = await replay(line, f"{name}.json")
    assert answer.json()[path] == body_of(SERVER, f"{name}.json")[path]


async def test_what_is_too_long_together_is_cut_silently(line: Line) -> None:
    answer = await replay(line, "err_prompt_plus_max_tokens.json")
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == 1000
    assert usage["completion_tokens"] <= MAX_MODEL_LEN - 1000
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("route", ["/v1/completions", "/inference/v1/generate"])
async def test_greedy_tokens_are_the_models_own(line: Line, route: str) -> None:
    sampling = {"max_tokens": 6, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    if route == "/v1/completions":
        body: dict[str, Any] = {"prompt": [PROMPT], "return_token_ids": True, **sampling}
    else:
        body = {"token_ids": PROMPT, "sampling_params": sampling}
    choice = (await line.ok(route, body))["choices"][0]
    model = TinyModel.load(line.weights[1])
    expected = list(PROMPT)
    for _ in range(6):
        expected.append(int(model.next_logits([expected])[0].argmax()))
    assert choice["token_ids"] == expected[5:]
    if route == "/v1/completions":
        logprobs = choice["logprobs"]["token_logprobs"]
    else:
        logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
        assert [one["rank"] for one in choice["logprobs"]["content"]] == [1] * 6
    own = model.logprobs(as_token_ids(expected), len(PROMPT))
    assert logprobs == pytest.approx(own.tolist(), abs=1e-4)


async def test_our_own_codec_understands_it(line: Line) -> None:
    dialect = VllmDialect()

    async def send(request: HttpRequest) -> HttpResponse:
        answer = await line.client.request(
            request.method, request.path, content=request.body, headers=list(request.headers)
        )
        return HttpResponse(answer.status_code, dict(answer.headers), answer.content)

    for request in dialect.load_weights(str(line.weights[2]), 7):
        dialect.parse_control(await send(request))
    info = dialect.parse_discover([await send(request) for request in dialect.discover()])
    assert (info.model, info.max_model_len, info.max_concurrency) == ("tiny", MAX_MODEL_LEN, 8)
    assert (info.weight_version, info.token_in_token_out) == (7, True)
    segment = SegmentRequest(
        request_id="one",
        token_ids=as_token_ids(PROMPT),
        max_new_tokens=5,
        gconfig=GenerationHyperparameters(ignore_eos=True),
    )
    answer = dialect.parse_generate(await send(dialect.generate(segment, info)), info)
    assert len(answer.token_ids) == 5
    assert answer.versions == (VersionSpan(7, 0, 5),)
    load = dialect.parse_load(await send(dialect.load()))
    assert (load.running, load.waiting, load.requests_finished) == (0, 0, 1)


@pytest.mark.parametrize(
    ("name", "route"),
    [("stream_completion.json", "/v1/completions"),
     ("generate_tito_stream.txt", "/inference/v1/generate")],
)  # fmt: skip
async def test_a_stream_has_the_keys_of_vllms(line: Line, name: str, route: str) -> None:
    if route == "/v1/completions":
        asked = question(SERVER, name)["json"]
        recorded = msgspec.json.decode((GOLDEN / name).read_bytes())["response"]
        theirs = events([one for _, one in recorded["sse_lines_with_time"]])
    else:
        sampling = {"max_tokens": 3, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        asked = {"token_ids": PROMPT, "sampling_params": sampling, "stream": True}
        theirs = events((GOLDEN / name).read_text().splitlines())
    answer = await line.post(route, {**asked, "ignore_eos": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    ours = events(answer.text.splitlines())
    assert [keys(one) for one in (ours[0], ours[-1])] == [
        keys(one) for one in (theirs[0], theirs[-1])
    ]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_gives_the_tokens_of_a_whole_answer(line: Line, n: int) -> None:
    asked = {"prompt": PROMPT, "seed": 5, "max_tokens": 9, "n": n, "logprobs": 0,
             "return_token_ids": True, "return_tokens_as_token_ids": True}  # fmt: skip
    whole = await line.ok("/v1/completions", asked)
    stream = await line.post("/v1/completions", {**asked, "stream": True})
    tokens: dict[int, list[int]] = {index: [] for index in range(n)}
    offsets: dict[int, list[int]] = {index: [] for index in range(n)}
    for event in events(stream.text.splitlines()):
        for choice in event["choices"]:
            tokens[choice["index"]] += choice["token_ids"]
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert [tokens[c["index"]] for c in whole["choices"]] == [
        c["token_ids"] for c in whole["choices"]
    ]
    assert [offsets[i] for i in range(n)] == [
        choice["logprobs"]["text_offset"] for choice in whole["choices"]
    ]
    assert len({tuple(choice["token_ids"]) for choice in whole["choices"]}) == n


@pytest.mark.parametrize("field", ["stop", "echo", "prompt_logprobs"])
async def test_what_it_cannot_do_it_refuses(line: Line, field: str) -> None:
    value = {"stop": ["a"], "echo": True, "prompt_logprobs": 0}[field]
    answer = await line.post("/v1/completions", {"prompt": PROMPT, field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


async def test_stop_tokens_stay_in_the_output(line: Line) -> None:
    greedy = {"prompt": PROMPT, "return_token_ids": True, **ENDLESS, "max_tokens": 8}
    ids = (await line.ok("/v1/completions", greedy))["choices"][0]["token_ids"]
    choice = (await line.ok("/v1/completions", {**greedy, "stop_token_ids": [ids[3]]}))["choices"][
        0
    ]
    assert choice["token_ids"] == ids[: ids.index(ids[3]) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[3])


async def test_eos_ends_an_answer_without_a_stop_reason(line: Line) -> None:
    body = {"prompt": PROMPT, "logit_bias": {"2": 100}, "return_token_ids": True}
    choice = (await line.ok("/v1/completions", body))["choices"][0]
    assert choice["token_ids"] == [2]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


class Stream:
    """A long answer in the making, on the token route."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.events: list[Any] = []

    async def run(self, line: Line, request_id: str = "long") -> None:
        body = {"token_ids": PROMPT, "stream": True, "sampling_params": {**ENDLESS, "logprobs": 0}}
        headers = {"X-Request-Id": request_id}
        lines = []
        async with line.client.stream(
            "POST", "/inference/v1/generate", json=body, headers=headers
        ) as answer:
            async for one in answer.aiter_lines():
                lines.append(one)
                self.started.set()
        self.events = events(lines)

    @property
    def last(self) -> Any:
        return self.events[-1]["choices"][0]

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event["choices"][0]["token_ids"]]


async def test_keep_reload_resume_goes_on_with_the_new_weights(line: Line) -> None:
    stream = Stream()
    await line.ok("/update_weight_version", {"new_version": "1"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        await line.ok("/pause?mode=keep")
        made = line.scheduler.counters.generated_tokens
        assert await line.reload(2) == {"results": [None]}
        await line.ok("/reset_prefix_cache?reset_running_requests=true")
        await line.ok("/update_weight_version", {"new_version": "2"})
        assert line.scheduler.counters.generated_tokens == made
        assert 0 < made < MAX_MODEL_LEN - len(PROMPT)
        await line.ok("/resume")
    total = MAX_MODEL_LEN - len(PROMPT)
    assert stream.last["finish_reason"] == "length"
    assert stream.last["weight_versions"] == [
        {"version": "1", "start": 0, "end": made},
        {"version": "2", "start": made, "end": total},
    ]
    assert stream.tokens == greedy(line, made, total)


def greedy(line: Line, switch: int, total: int) -> list[int]:
    """The answer of a model whose weights are changed after ``switch`` tokens."""
    old, new = TinyModel.load(line.weights[1]), TinyModel.load(line.weights[2])
    tokens = list(PROMPT)
    for at in range(total):
        tokens.append(int((old if at < switch else new).next_logits([tokens])[0].argmax()))
    return tokens[len(PROMPT) :]


async def test_pause_abort_returns_what_is_there_and_the_next_waits(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        await line.ok("/pause")
        assert not line.scheduler.running
        later = Stream()
        nursery.start_soon(later.run, line)
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 1)
        assert (await line.client.get("/is_paused")).json() == {"is_paused": True}
        assert (await line.client.get("/health")).status_code == 200
        await line.ok("/resume")
    assert stream.last["finish_reason"] == "abort"
    assert stream.last["weight_versions"] == [
        {"version": "default", "start": 0, "end": len(stream.tokens)}
    ]
    assert later.last["finish_reason"] == "length"
    assert later.tokens[: len(stream.tokens)] == stream.tokens


async def test_pause_wait_answers_when_the_running_have_finished(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        assert len(line.scheduler.running) == 1
        await line.ok("/pause?mode=wait")
        assert not line.scheduler.running
    assert stream.last["finish_reason"] == "length"


async def test_resume_ends_a_pause_that_still_waits(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        await line.ok("/pause?mode=keep")
        async with trio.open_nursery() as inner:
            inner.start_soon(line.ok, "/pause?mode=wait")
            await line.watch.until(lambda scheduler: scheduler.pause_mode == "wait")
            await line.ok("/resume")
    assert stream.last["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("route", "abort", "request_id"),
    [("/v1/completions", "/abort_requests", "cmpl-my-1-0"),
     ("/inference/v1/generate", "/inference/v1/abort_requests", "generate-tokens-my-1"),
     ("/inference/v1/generate", "/abort_requests", "generate-tokens-my-1")],
)  # fmt: skip
async def test_abort_by_id_ends_one_request(
    line: Line, route: str, abort: str, request_id: str
) -> None:
    answers: list[Any] = []

    async def ask(name: str) -> None:
        body = {"prompt": PROMPT, "token_ids": PROMPT, **ENDLESS, "sampling_params": ENDLESS}
        answers.append(await line.ok(route, body, headers={"X-Request-Id": name}))

    await line.ok("/pause?mode=keep")
    async with trio.open_nursery() as nursery:
        for name in ("my-1", "my-2"):
            nursery.start_soon(ask, name)
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 2)
        reply = await line.ok(abort, {"request_ids": [request_id, "nobody"]})
        assert reply in (None, {"status": "aborted", "aborted": 1})
        await line.ok("/resume")
    assert [one["choices"][0]["finish_reason"] for one in answers] == ["abort", "length"]
    assert "my-1" in (answers[0].get("id") or answers[0]["request_id"])


async def test_abort_without_ids_ends_everything(line: Line) -> None:
    streams = [Stream(), Stream()]
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.run, line)
        for stream in streams:
            await stream.started.wait()
        assert await line.ok("/abort_requests", {}) == {"status": "aborted", "aborted": 2}
    assert [stream.last["finish_reason"] for stream in streams] == ["abort", "abort"]
    assert line.scheduler.counters.finished["abort"] == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_takes_its_requests_along(line: Line, stream: bool) -> None:
    await line.ok("/pause?mode=keep")
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(line.post, "/v1/completions",
                               {"prompt": PROMPT, "stream": stream, **ENDLESS})  # fmt: skip
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 10)
        nursery.cancel_scope.cancel()
    await line.watch.until(lambda scheduler: not scheduler.running and not scheduler.waiting)
    assert line.scheduler.counters.finished["abort"] == 0
    await line.ok("/resume")
    await line.ok("/v1/completions", {"prompt": PROMPT})


async def test_metrics_show_what_runs_and_what_waits(line: Line) -> None:
    await line.ok("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True})
    async with trio.open_nursery() as nursery:
        for _ in range(11):
            nursery.start_soon(line.post, "/v1/completions", {"prompt": PROMPT, **ENDLESS})
        await line.watch.until(lambda scheduler: len(scheduler.waiting) == 3)
        await line.ok("/pause?mode=keep")
        page = (await line.client.get("/metrics")).text
        nursery.cancel_scope.cancel()
    labels = 'engine="0",model_name="tiny"'
    assert f"vllm:num_requests_running{{{labels}}} 8.0\n" in page
    assert f"vllm:num_requests_waiting{{{labels}}} 3.0\n" in page
    finished = 'engine="0",finished_reason="length",model_name="tiny"'
    assert f"vllm:request_success_total{{{finished}}} 1.0\n" in page
    assert f"arealtrio_embedded:requests_total{{{labels}}} 12.0\n" in page
    recorded = (GOLDEN / "metrics_busy.prom").read_text()
    ours = {one.split("{")[0] for one in page.splitlines() if one.startswith("vllm:")}
    assert all(f"\n{name}{{" in recorded for name in ours)


async def test_two_hundred_at_once(line: Line) -> None:
    answers: list[Any] = []

    async def ask(number: int) -> None:
        body = {"prompt": [number % 300 + 3, 5], "max_tokens": 6, "seed": number}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answers.append(await line.ok("/v1/completions", body))

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(ask, number)
    assert len({answer["id"] for answer in answers}) == 200
    assert all(len(answer["choices"][0]["token_ids"]) == 6 for answer in answers)
    assert line.scheduler.counters.finished["length"] == 200
    assert line.scheduler.counters.generated_tokens == 1200


async def test_a_seed_gives_the_same_answer_in_any_company(line: Line) -> None:
    asked = {"prompt": PROMPT, "seed": 11, "max_tokens": 12, "return_token_ids": True}
    alone = (await line.ok("/v1/completions", asked))["choices"][0]["token_ids"]
    crowd: list[list[int]] = []

    async def ask() -> None:
        crowd.append((await line.ok("/v1/completions", asked))["choices"][0]["token_ids"])

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(ask)
    assert crowd == [alone] * 12
    other = (await line.ok("/v1/completions", {**asked, "seed": 12}))["choices"][0]["token_ids"]
    assert other != alone


async def bad_reload(line: Line) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}}
    answer = await line.post("/collective_rpc", body)
    assert answer.status_code == 500
    assert (await line.client.get("/health")).status_code == 200


async def test_a_good_reload_heals_a_bad_one(line: Line) -> None:
    await bad_reload(line)
    assert line.scheduler.state == "poisoned"
    await line.reload(2)
    await line.ok("/v1/completions", {"prompt": PROMPT})
    assert not line.server.stopped.is_set()


async def test_a_bad_reload_kills_at_the_next_token(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    await bad_reload(line)
    answer = await line.post("/v1/completions", {"prompt": PROMPT})
    assert answer.status_code == 500
    assert answer.json() == body_of(SERVER, "completion_after_failed_wt.json")
    with trio.fail_after(1):
        await line.server.stopped.wait()
    assert "died" in caplog.text
    with pytest.raises(httpx.ConnectError):
        await line.client.get("/health")


async def test_a_stream_ends_with_the_error_when_the_engine_dies(line: Line) -> None:
    stream = Stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, line)
        await stream.started.wait()
        body = {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}}
        assert (await line.post("/collective_rpc", body)).status_code == 500
    assert stream.events[-1] == body_of(SERVER, "completion_after_failed_wt.json")


async def test_weights_of_another_vocabulary_are_refused(line: Line, tmp_path: Path) -> None:
    other = tmp_path / "other"
    TinyModel.random(0, vocab_size=5).save(other)
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(other)}}
    answer = await line.post("/collective_rpc", body)
    assert answer.status_code == 500
    assert "5 tokens cannot replace weights of 371" in answer.json()["error"]["message"]


async def test_sleep_is_a_pause(line: Line) -> None:
    await line.ok("/sleep?level=2")
    assert (await line.client.get("/is_paused")).json() == body_of(
        SERVER, "is_paused_sleeping.json"
    )
    assert (await line.client.get("/is_sleeping")).json() == {"is_sleeping": True}
    await line.ok("/wake_up")
    assert (await line.client.get("/is_sleeping")).json() == {"is_sleeping": False}
    await line.ok("/v1/completions", {"prompt": PROMPT})


async def test_openapi_lists_the_routes_it_has(line: Line) -> None:
    paths = (await line.client.get("/openapi.json")).json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            answer = await line.client.request(method.upper(), path)
            assert answer.status_code not in (404, 405), path
    recorded = (GOLDEN / "routes.txt").read_text().split()
    # there with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, which the recorded server did not have
    adapters = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    assert set(paths) - adapters <= set(recorded)


async def test_processed_logprobs_are_after_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": PROMPT, "seed": 3, "max_tokens": 4, "temperature": 0.5, "logprobs": 0}
    modes = {}
    for mode in ("raw_logprobs", "processed_logprobs"):
        async with open_line(tmp_path, monkeypatch, logprobs_mode=mode) as line:
            answer = await line.ok("/v1/completions", {**asked, "return_token_ids": True})
            modes[mode] = answer["choices"][0]
    raw, processed = modes["raw_logprobs"], modes["processed_logprobs"]
    assert raw["token_ids"] == processed["token_ids"]
    sequence = [*PROMPT, *raw["token_ids"]]
    logits = TinyModel.load(line.weights[1]).next_logits([sequence[:5]])[0] / 0.5
    expected = logits[sequence[5]] - math.log(sum(math.exp(x) for x in logits.tolist()))
    assert processed["logprobs"]["token_logprobs"][0] == pytest.approx(expected, abs=1e-4)
    assert raw["logprobs"]["token_logprobs"] != processed["logprobs"]["token_logprobs"]
