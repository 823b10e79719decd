"""What adaptive caps are worth on a server whose cache does not hold what it may run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse, ModelRequest

STEP_S = 0.02
SMALL, LARGE = 4_000, 40_000  # tokens of cache: twenty answers of 200 in full length, and 200
PREFILL_TOKENS = 256  # in the time of a step
ANSWER = GenerationHyperparameters(max_new_tokens=200, greedy=True)


class Sequence:
    """One request: how many tokens it wants and has; its prefix has to be computed to go on."""

    def __init__(self, prompt: int, wanted: int) -> None:
        self.prompt, self.wanted, self.made = prompt, wanted, 0
        self.done = trio.Event()

    @property
    def size(self) -> int:
        return self.prompt + self.made


class SmallCache:
    """A server that runs all it is sent, and puts the youngest back when its cache is full.

    It is vLLM's scheduler in small: a sequence put back loses its cached prefix, which is computed
    again, at the cost of whole steps, when it next runs.
    """

    def __init__(self, cache_tokens: int) -> None:
        self.cache_tokens = cache_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self.finished = 0
        self._arrived = trio.Event()

    async def run(self) -> None:
        while True:
            while not (self.running or self.waiting):
                await self._arrived.wait()
            await trio.sleep(STEP_S * (1 + self._admit() / PREFILL_TOKENS))
            self._decode()

    def _used(self) -> int:
        return sum(sequence.size for sequence in self.running)

    def _admit(self) -> int:
        """Take in what fits now, as a server does that can not know how long answers get."""
        prefilled = 0
        while self.waiting and self._used() + self.waiting[0].size < self.cache_tokens:
            self.running.append(self.waiting.pop(0))
            prefilled += self.running[-1].size
        return prefilled

    def _decode(self) -> None:
        while self._used() + len(self.running) > self.cache_tokens:
            self.waiting.insert(0, self.running.pop())
            self.preemptions += 1
        for sequence in list(self.running):
            sequence.made += 1
            if sequence.made == sequence.wanted:
                self.running.remove(sequence)
                self.finished += 1
                sequence.done.set()

    async def answer(self, request: HttpRequest) -> HttpResponse:
        if request.path == "/v1/completions":
            return await self._generate(json.loads(request.body))
        if request.path == "/metrics":
            return HttpResponse(200, {}, self._metrics())
        if request.path == "/v1/models":
            return HttpResponse(200, {}, b'{"data":[{"id":"m"}]}')
        if request.path == "/health":
            return HttpResponse(200, {}, b"")
        return HttpResponse(404, {}, b'{"detail":"Not Found"}')

    async def _generate(self, question: dict[str, Any]) -> HttpResponse:
        sequence = Sequence(len(question["prompt"]), question["max_tokens"])
        self.waiting.append(sequence)
        self._arrived.set()
        self._arrived = trio.Event()
        await sequence.done.wait()
        ids, logprobs = [7] * sequence.made, {"token_logprobs": [-1.0] * sequence.made}
        choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": "length"}
        return HttpResponse(200, {}, json.dumps({"choices": [choice]}).encode())

    def _metrics(self) -> bytes:
        return (
            f"vllm:num_requests_running {len(self.running)}\n"
            f"vllm:num_requests_waiting {len(self.waiting)}\n"
            f"vllm:request_success_total {self.finished}\n"
            f"vllm:num_preemptions_total {self.preemptions}\n"
            f"vllm:kv_cache_usage_perc {self._used() / self.cache_tokens}\n"
        ).encode()


class Caches:
    """A transport to servers with caches of these sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.servers = {f"http://server-{n}:1": SmallCache(size) for n, size in enumerate(sizes)}

    async def request(
        self, base_url: str, request: HttpRequest, *_: Any, **__: Any
    ) -> HttpResponse:
        await trio.lowlevel.checkpoint()
        return await self.servers[base_url].answer(request)

    def stream(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class Measured:
    """How long it took on trio's clock, and what each server did meanwhile."""

    took_s: float
    preemptions: list[int]
    allowed: list[int]


async def measure(sizes: list[int], clients: int, answers: int, *, adaptive: bool) -> Measured:
    """Generate ``answers`` answers, ``clients`` at once, on servers with these caches."""
    transport, left = Caches(sizes), iter(range(answers))
    config = RolloutConfig(
        servers=list(transport.servers),
        max_requests_per_server=64,
        adaptive_caps=adaptive,
        pressure_interval_s=1.0,
    )

    async def client(engine: RemoteEngine) -> None:
        for _ in left:
            await engine.agenerate(ModelRequest([1] * 20, ANSWER))

    async with trio.open_nursery() as nursery:
        for server in transport.servers.values():
            nursery.start_soon(server.run)
        async with open_engine(config, transport=transport) as engine:
            started = trio.current_time()
            async with trio.open_nursery() as running:
                for _ in range(clients):
                    running.start_soon(client, engine)
            took_s = trio.current_time() - started
            allowed = [row.allowed for row in engine.statistics()]
        nursery.cancel_scope.cancel()
    return Measured(took_s, [s.preemptions for s in transport.servers.values()], allowed)


async def test_what_a_server_can_not_hold_goes_where_there_is_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    static = await measure([SMALL, LARGE], 96, 1200, adaptive=False)
    adaptive = await measure([SMALL, LARGE], 96, 1200, adaptive=True)
    assert static.allowed == [64, 64]
    assert adaptive.allowed[0] < 48
    assert adaptive.allowed[1] == 64
    assert adaptive.preemptions[0] < static.preemptions[0] / 4
    assert adaptive.took_s < 0.95 * static.took_s


async def test_a_lone_server_preempts_less_and_that_is_all(
    autojump_clock: trio.testing.MockClock,
) -> None:
    static = await measure([SMALL], 64, 600, adaptive=False)
    adaptive = await measure([SMALL], 64, 600, adaptive=True)
    assert adaptive.preemptions[0] < static.preemptions[0] / 4
    assert adaptive.took_s < 1.2 * static.took_s


async def test_a_cap_stays_full_where_there_is_room(autojump_clock: trio.testing.MockClock) -> None:
    adaptive = await measure([LARGE], 64, 300, adaptive=True)
    assert (adaptive.preemptions, adaptive.allowed) == ([0], [64])
