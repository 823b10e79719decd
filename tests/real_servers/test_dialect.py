"""Our codec's questions, a real server's answers: what ``wire.vllm`` writes, vLLM reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import httpx
import numpy as np
import pytest
import trio

from arealtrio.errors import RequestRejected, RolloutError
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    PauseMode,
    as_token_ids,
)
from arealtrio.wire.dialect import SegmentRequest, SegmentResponse, ServerInfo, VersionSpan
from arealtrio.wire.vllm import VllmDialect

from .server import CAP, MAX_MODEL_LEN, MODEL, VllmServer
from .until import until

pytestmark = pytest.mark.real_servers

DIALECT = VllmDialect()
GREEDY = GenerationHyperparameters(greedy=True, ignore_eos=True)
PROMPT = [300, 301, 302, 303, 304]
LONG = 3000  # tokens: some six seconds, in which to interrupt it
ROUTES = {"tokens": True, "completions": False}


@dataclass
class Line:
    """The dialect, a server and nothing between them but HTTP."""

    server: VllmServer
    client: httpx.AsyncClient
    info: ServerInfo
    tokens_before: float = 0.0

    async def send(self, request: HttpRequest) -> HttpResponse:
        answer = await self.client.request(
            request.method,
            request.path,
            content=request.body,
            headers=[("content-type", "application/json"), *request.headers],
        )
        return HttpResponse(answer.status_code, dict(answer.headers), answer.content)

    async def control(self, *requests: HttpRequest) -> None:
        for request in requests:
            DIALECT.parse_control(await self.send(request))

    async def generate(
        self,
        tokens: int,
        prompt: list[int] = PROMPT,
        gconfig: GenerationHyperparameters = GREEDY,
        request_id: str = "question",
    ) -> SegmentResponse:
        segment = SegmentRequest(
            request_id=request_id,
            token_ids=as_token_ids(prompt),
            max_new_tokens=tokens,
            gconfig=gconfig,
        )
        answer = await self.send(DIALECT.generate(segment, self.info))
        return DIALECT.parse_generate(answer, self.info)

    def has_generated(self, tokens: int) -> bool:
        now = self.server.metrics()
        return now["vllm:num_requests_running"] > 0 and self.tokens_made(now) >= tokens

    def tokens_made(self, metrics: dict[str, float]) -> float:
        return metrics["vllm:generation_tokens_total"] - self.tokens_before


@pytest.fixture
async def line(vllm_server: VllmServer) -> AsyncIterator[Line]:
    # After a 500 vLLM closes its side and says nothing, so each question has its own connection.
    no_reuse = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=vllm_server.url, timeout=60, trust_env=False, limits=no_reuse
    ) as client:
        line = Line(vllm_server, client, ServerInfo())
        line.info = DIALECT.parse_discover([await line.send(r) for r in DIALECT.discover()])
        line.tokens_before = vllm_server.metrics().get("vllm:generation_tokens_total", 0)
        yield line


@pytest.fixture(params=ROUTES)
async def either_route(request: pytest.FixtureRequest, line: Line) -> Line:
    line.info = replace(line.info, token_in_token_out=ROUTES[request.param])
    return line


async def test_discover_reads_what_the_server_was_started_with(line: Line) -> None:
    assert line.info == ServerInfo(
        model=MODEL,
        max_model_len=MAX_MODEL_LEN,
        max_concurrency=CAP,
        weight_version=0,
        token_in_token_out=True,
        streams_news=True,
        logprobs_tempered=False,
        tells_experts=False,
    )


async def test_generate_gives_the_tokens_of_a_direct_request(either_route: Line) -> None:
    ids, logprobs = either_route.server.greedy(PROMPT, 48)
    answer = await either_route.generate(48)
    assert answer.token_ids.tolist() == ids
    assert answer.logprobs.tolist() == pytest.approx(logprobs, abs=1e-4)
    assert answer.stop_reason == "length"
    spans = (VersionSpan(0, 0, 48),)
    assert answer.versions == (spans if either_route.info.token_in_token_out else None)


async def test_a_stop_token_ends_the_answer_and_stays_in_it(either_route: Line) -> None:
    ids, _ = either_route.server.greedy(PROMPT, 32)
    stop = ids[12]
    answer = await either_route.generate(32, gconfig=GREEDY.new(stop_token_ids=(stop,)))
    assert answer.token_ids.tolist() == ids[: ids.index(stop) + 1]
    assert answer.stop_reason == "stop"


async def test_a_seed_repeats_a_sample(either_route: Line) -> None:
    sampled = GenerationHyperparameters(temperature=1.0, ignore_eos=True)

    async def sample(seed: int) -> list[int]:
        segment = SegmentRequest(
            request_id=f"seed-{seed}",
            token_ids=as_token_ids(PROMPT),
            max_new_tokens=32,
            gconfig=sampled,
            seed=seed,
        )
        answer = await either_route.send(DIALECT.generate(segment, either_route.info))
        ids: list[int] = DIALECT.parse_generate(answer, either_route.info).token_ids.tolist()
        return ids

    first, again, other = [await sample(seed) for seed in (7, 7, 8)]
    assert first == again
    assert first != other


async def interrupted(line: Line, *requests: HttpRequest) -> SegmentResponse:
    """Send ``requests`` once a long greedy generation is under way; return what became of it."""
    answers: list[SegmentResponse] = []

    async def ask() -> None:
        answers.append(await line.generate(LONG))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await until(lambda: line.has_generated(200), "200 tokens are there")
        await line.control(*requests)
    return answers[0]


async def assert_resumes_exactly(line: Line, partial: SegmentResponse) -> None:
    """Prompt and tokens so far, asked again, go on as if nothing had happened."""
    made = partial.token_ids.tolist()
    whole, _ = line.server.greedy(PROMPT, len(made) + 64)
    assert made == whole[: len(made)]
    rest = await line.generate(64, prompt=PROMPT + made)
    assert rest.token_ids.tolist() == whole[len(made) :]


async def test_abort_finds_the_request_by_our_id(either_route: Line) -> None:
    answer = await interrupted(either_route, DIALECT.abort("question", either_route.info))
    assert answer.stop_reason == "abort"
    assert 0 < len(answer.token_ids) < LONG
    assert len(answer.token_ids) == len(answer.logprobs)
    await assert_resumes_exactly(either_route, answer)
    assert either_route.server.in_flight() == 0


async def test_abort_of_another_id_is_harmless(either_route: Line) -> None:
    await either_route.control(DIALECT.abort("nobody", either_route.info))
    assert (await either_route.generate(4)).stop_reason == "length"


async def test_pause_abort_returns_what_is_there(line: Line) -> None:
    answer = await interrupted(line, DIALECT.pause("abort"), DIALECT.resume())
    assert answer.stop_reason == "abort"
    await assert_resumes_exactly(line, answer)


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
async def test_a_paused_server_is_healthy_and_goes_on_when_resumed(
    line: Line, mode: PauseMode
) -> None:
    await line.control(DIALECT.pause(mode), DIALECT.pause(mode))
    DIALECT.parse_health(await line.send(DIALECT.health()))
    with trio.move_on_after(0.3) as waiting:
        await line.generate(1)
    assert waiting.cancelled_caught, "a paused server answered"
    await line.control(DIALECT.resume(), DIALECT.resume())
    assert (await line.generate(4)).stop_reason == "length"


async def test_an_update_in_the_middle_shows_in_the_spans(line: Line) -> None:
    """Paused, loaded, labelled, resumed: the old weights' tokens, then exactly the new weights'."""
    path = str(line.server.models / "tiny-2")
    update = [DIALECT.pause("keep"), *DIALECT.load_weights(path, 1), DIALECT.resume()]
    answer = await interrupted(line, *update)
    assert answer.stop_reason == "length"
    assert answer.versions is not None
    old, new = answer.versions
    assert (old.version, old.start) == (0, 0)
    assert (new.version, new.start, new.end) == (1, old.end, LONG)
    made = answer.token_ids.tolist()
    await assert_continues(line, made, at=old.end)
    line.server.load("tiny-1", version=0)
    before, _ = line.server.greedy(PROMPT, old.end)
    assert made[: old.end] == before


async def assert_continues(line: Line, made: list[int], at: int) -> None:
    """What follows ``at`` is what the present weights make of all before it: no stale cache."""
    after, _ = line.server.greedy(PROMPT + made[:at], 64)
    assert made[at : at + 64] == after


async def test_the_label_is_what_was_set(line: Line) -> None:
    await line.control(*DIALECT.load_weights(str(line.server.models / "tiny-3"), 41))
    answer = await line.send(DIALECT.weight_version())
    assert DIALECT.parse_weight_version(answer) == 41
    assert (await line.generate(3)).versions == (VersionSpan(41, 0, 3),)


async def test_a_failed_update_is_an_error_and_a_good_one_heals(line: Line) -> None:
    requests = DIALECT.load_weights(str(line.server.models / "no-such-model"), 1)
    (bad,) = [request for request in requests if request.path == "/collective_rpc"]
    with pytest.raises(RolloutError):
        await line.control(bad)
    await line.control(*DIALECT.load_weights(str(line.server.models / "tiny-1"), 2))
    assert (await line.generate(3)).versions == (VersionSpan(2, 0, 3),)


async def test_the_gauges_count_running_and_finished(line: Line) -> None:
    before = DIALECT.parse_load(await line.send(DIALECT.load()))
    await line.generate(2)
    await line.generate(2)
    after = DIALECT.parse_load(await line.send(DIALECT.load()))
    assert (after.running, after.waiting) == (0, 0)
    assert after.requests_finished == before.requests_finished + 2


@pytest.mark.parametrize(
    "prompt", [[300] * (MAX_MODEL_LEN + 1), [10**6]], ids=["too-long", "outside-the-vocabulary"]
)
async def test_what_no_model_can_read_is_rejected(either_route: Line, prompt: list[int]) -> None:
    with pytest.raises(RequestRejected) as caught:
        await either_route.generate(1, prompt=prompt)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 500, "the prompt is in the message"


async def test_logprobs_are_log_probabilities(either_route: Line) -> None:
    answer = await either_route.generate(32, gconfig=GenerationHyperparameters(ignore_eos=True))
    assert answer.logprobs.dtype == np.float32
    assert np.all(answer.logprobs <= 0)
