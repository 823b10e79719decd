"""Whatever happens to the servers, a generation is what an undisturbed server would have given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import TransportError, WeightUpdateError
from arealtrio.servers import ServerState
from arealtrio.testing import (
    EOS,
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    open_fleet,
)
from arealtrio.transport import RESPONSE_SIZE_BYTES_MAX
from arealtrio.types import HttpRequest, HttpResponse, ModelRequest, ModelResponse, TimeLimits
from arealtrio.weights import WeightUpdate, update_weights

LENGTH = 150  # tokens; 3 s undisturbed
CAPS = (2, 3, 1)
GENERATIONS = 10
GENERATE = "/inference/v1/generate"


class Asked(NamedTuple):
    """One question to a server, as it went over the wire."""

    rid: str
    token_ids: list[int]
    max_tokens: int


class Watching:
    """A transport in front of a fleet that keeps every question."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet = fleet
        self.asked: list[Asked] = []

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        if request.method == "POST" and request.path == GENERATE:
            body = msgspec.json.decode(request.body)
            rid = body["request_id"].rpartition("-")[0]
            sampling = body["sampling_params"]
            self.asked.append(Asked(rid, body["token_ids"], sampling["max_tokens"]))
        return await self.fleet.request(
            base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
        )

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        return self.fleet.stream(*args, **kwargs)

    async def aclose(self) -> None:
        await self.fleet.aclose()


class Event(NamedTuple):
    """Something that happens to a server, or to all."""

    after_s: float
    what: str
    server: int


HAPPENINGS = (
    *("die", "restart", "hang", "abort", "pause keep", "pause abort", "add", "remove", "eject"),
    *("update keep", "update abort", "update wait", "rolling update", "update missing"),
    *("cancel update", "cap 0", "cap 2"),
)
EVENTS = st.lists(
    st.builds(
        Event,
        st.sampled_from([0.0, 0.02, 0.31, 1.0, 2.7, 11.0]),
        st.sampled_from(HAPPENINGS),
        st.integers(0, len(CAPS) - 1),
    ),
    max_size=14,
)


class World:
    """The engine, its servers, and what is done to them."""

    def __init__(self, engine: RemoteEngine, fleet: SimulatedFleet) -> None:
        self.engine = engine
        self.fleet = fleet
        self.versions = 0

    async def do(self, event: Event) -> None:
        server = self.fleet.servers[event.server]
        name, _, detail = event.what.partition(" ")
        actions: dict[str, Callable[[], Awaitable[None]]] = {
            "abort": lambda: self._abort(server.address),
            "pause": lambda: self._pause(detail),
            "update": lambda: self._update(detail),
            "rolling": lambda: self._update("keep", rolling=True),
            "cancel": self._cancelled_update,
        }
        if name in ("die", "restart", "hang"):
            getattr(server, name)()
        elif name in actions:
            await actions[name]()
        else:
            self._membership(name, detail, server.address)

    def _membership(self, name: str, detail: str, address: str) -> None:
        pool = self.engine.pool
        known = {s.address: s for s in pool.servers}
        if name == "add" and address not in known:
            pool.add(address)
        elif name == "remove" and address in known:
            pool.remove(address)
        elif name == "cap" and address in known:
            pool.set_cap(address, int(detail))
        elif name == "eject" and address in known and known[address].state is ServerState.READY:
            pool.set_state(known[address], ServerState.EJECTED, "the test says so")

    async def _abort(self, address: str) -> None:
        """Another client aborts everything there."""
        request = HttpRequest("POST", "/abort_requests", b"{}")
        with trio.move_on_after(1), suppress(TransportError):  # it may die meanwhile
            for server in self.engine.pool.servers:
                if server.address == address and self._is_up(address):
                    await self.engine.pool.send(server, request, TimeLimits.of(1.0))

    def _is_up(self, address: str) -> bool:
        return any(s.address == address and s.condition.value == "up" for s in self.fleet)

    async def _pause(self, mode: Any) -> None:
        async with self.engine.paused(mode):
            await trio.sleep(0.5)

    async def _update(self, mode: Any, *, rolling: bool = False) -> None:
        self.versions += 1
        path = "/simulated/missing" if mode == "missing" else checkpoint(self.versions)
        pause: Any = "keep" if mode == "missing" else mode
        update = WeightUpdate.from_disk(path, self.versions, pause=pause, rolling=rolling)
        with suppress(WeightUpdateError):  # the version stays, and the run goes on
            await update_weights(self.engine.pool, update)

    async def _cancelled_update(self) -> None:
        with trio.move_on_after(0.2):
            await self._update("keep")

    async def mend(self) -> None:
        """Give every server a good end: up, in the pool, with weights that are known."""
        for server in self.fleet:
            if server.condition.value != "up":
                server.restart()
            self._membership("add", "", server.address)
            if server.address in {s.address for s in self.engine.pool.servers}:
                self._membership("cap", "3", server.address)
        while self.engine.get_version() < self.versions or not self.versions:
            await trio.sleep(5)  # what is to be noticed is noticed at named intervals
            await self._update("keep")


def check_bounds(engine: RemoteEngine, fleet: SimulatedFleet) -> None:
    """Invariant I4, seen from both sides."""
    for server in engine.pool.servers:
        if engine.pool._is_known(server):
            assert engine.pool.outstanding(server) <= max(3, server.cap)
    for simulated in fleet:
        assert simulated.generations <= max(CAPS)


def check_answer(answer: ModelResponse, told: int) -> None:
    """Nothing lost, nothing twice; versions true, in order, and of this run (I8)."""
    tokens, versions = answer.output_tokens.tolist(), answer.output_versions.tolist()
    assert tokens == list(range(EOS + LENGTH - 1, EOS - 1, -1))
    assert len(answer.output_logprobs) == len(versions) == LENGTH
    assert versions == [made_by(float(logprob)) for logprob in answer.output_logprobs]
    assert versions == sorted(versions)
    assert versions[-1] <= told
    assert answer.stop_reason == "stop"
    ends = [0, *(segment.end for segment in answer.segments)]
    assert [segment.start for segment in answer.segments] == ends[:-1]


def check_questions(
    asked: list[Asked], answer: ModelResponse, budget: int, segment_tokens: int | None
) -> None:
    """Each asked for the rest of one answer: prompt + tokens so far, remaining budget."""
    whole = [*answer.input_tokens.tolist(), *answer.output_tokens.tolist()]
    prompt_len, so_far = answer.input_len, 0
    questions = [question for question in asked if question.rid == answer.rid]
    assert len(questions) >= len(answer.segments)
    for question in questions:
        count = len(question.token_ids) - prompt_len
        assert question.token_ids == whole[: len(question.token_ids)]
        assert count >= so_far  # it never goes back
        assert question.max_tokens == min(budget - count, segment_tokens or budget)
        so_far = count
    starts = {len(question.token_ids) - prompt_len for question in questions}
    assert {segment.start for segment in answer.segments} <= starts


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(EVENTS, st.sampled_from([None, 1000, 40, 7]))
@example([Event(0.0, "update keep", 0), Event(1.0, "restart", 1)], None)  # in a busy moment
@example(  # an update reaches the new process while it makes tokens with its first weights
    [Event(0.0, "update keep", 0), Event(1.0, "restart", 0), Event(0.02, "rolling update", 0)],
    None,
)
def test_every_interleaving_gives_what_an_undisturbed_server_gives(
    events: list[Event], segment_tokens: int | None
) -> None:
    trio.run(run, events, segment_tokens, clock=trio.testing.MockClock(autojump_threshold=0))


async def run(events: list[Event], segment_tokens: int | None) -> None:
    servers = [SimulatedServerSettings(max_num_seqs=cap, load_time_s=0.4) for cap in CAPS]
    answers: list[ModelResponse] = []
    async with open_fleet(servers, lengths=FixedLengths(LENGTH)) as fleet:
        watching = Watching(fleet)
        config = RolloutConfig(
            servers=fleet.addresses,
            segment_tokens=segment_tokens,
            max_failovers=1000,
            no_server_grace_s=1e6,
            probe_interval_max_s=4.0,
            segment_timeout_s=60.0,
        )
        async with open_engine(config, transport=watching) as engine:
            for simulated in fleet:
                simulated.on_change = lambda _: check_bounds(engine, fleet)

            async def generate(number: int) -> None:
                request = ModelRequest([number + 1, 7], rid=f"g{number}")
                answers.append(await engine.agenerate(request))

            world = World(engine, fleet)
            with trio.fail_after(2000):
                async with trio.open_nursery() as nursery:
                    for number in range(GENERATIONS):
                        nursery.start_soon(generate, number)
                    for event in events:
                        await trio.sleep(event.after_s)
                        nursery.start_soon(world.do, event)
                    await trio.sleep(60)
                    await world.mend()
            assert engine.pool.waiting == 0
            assert all(row.outstanding == 0 for row in engine.statistics())
            told = engine.pool.newest_told
            totals = engine.totals()
        await trio.testing.wait_all_tasks_blocked()
        for simulated in fleet:  # I9
            assert simulated.generations == 0
            assert not simulated.scheduler.running
            assert not simulated.scheduler.waiting
    assert len(answers) == GENERATIONS
    assert totals.tokens_generated - totals.tokens_discarded == GENERATIONS * LENGTH
    assert totals.tokens_discarded == 0
    budget = 16384
    for answer in answers:
        check_answer(answer, told)
        check_questions(watching.asked, answer, budget, segment_tokens)
