"""Whatever happens to the servers, a generation is what an undisturbed server would have given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence, Set
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
    SimulatedServer,
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
DIALECTS = ("vllm", "sglang")
ABORT_ALL = {
    "vllm": HttpRequest("POST", "/abort_requests", b"{}"),
    "sglang": HttpRequest("POST", "/abort_request", b'{"abort_all":true}'),
}


class Asked(NamedTuple):
    """One question to a server, as it went over the wire."""

    rid: str
    token_ids: list[int]
    max_tokens: int


def read_question(request: HttpRequest) -> Asked | None:
    """What either dialect asks for; None where it is something else."""
    if request.method != "POST" or not request.path.endswith("/generate"):
        return None
    body = msgspec.json.decode(request.body)
    sampling = body["sampling_params"]
    if "rid" in body:  # SGLang
        rid, token_ids, most = body["rid"], body["input_ids"], sampling["max_new_tokens"]
    else:
        rid, token_ids, most = body["request_id"], body["token_ids"], sampling["max_tokens"]
    return Asked(rid.rpartition("-")[0], token_ids, most)


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
        self._note(request)
        return await self.fleet.request(
            base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
        )

    def stream(self, base_url: str, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        self._note(request)
        return self.fleet.stream(base_url, request, *args, **kwargs)

    def _note(self, request: HttpRequest) -> None:
        question = read_question(request)
        if question is not None:
            self.asked.append(question)

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
        self.restarted: set[str] = set()

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
        if name == "restart":
            self._restart(server)
        elif name in ("die", "hang"):
            getattr(server, name)()
        elif name in actions:
            await actions[name]()
        else:
            self._membership(name, detail, server.address)

    def _restart(self, server: SimulatedServer) -> None:
        server.restart()
        self.restarted.add(server.address)

    def _membership(self, name: str, detail: str, address: str) -> None:
        pool = self.engine.pool
        known = {s.address: s for s in pool.servers}
        if name == "add" and address not in known:
            pool.fleet.add(address)
        elif name == "remove" and address in known:
            pool.fleet.remove(address)
        elif name == "cap" and address in known:
            pool.fleet.set_cap(address, int(detail))
        elif name == "eject" and address in known and known[address].state is ServerState.READY:
            pool.set_state(known[address], ServerState.EJECTED, "the test says so")

    async def _abort(self, address: str) -> None:
        """Another client aborts everything there."""
        request = ABORT_ALL[self.engine.config.backend]
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
        in_vain = mode == "missing" or (mode == "wait" and self.engine.config.backend == "sglang")
        pause: Any = "keep" if in_vain else mode  # SGLang has no wait
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
                self._restart(server)
            self._membership("add", "", server.address)
            if server.address in {s.address for s in self.engine.pool.servers}:
                self._membership("cap", "3", server.address)
        while self.engine.get_version() < self.versions or not self.versions:
            await trio.sleep(5)  # what is to be noticed is noticed at named intervals
            await self._update("keep")


def check_bounds(engine: RemoteEngine, fleet: SimulatedFleet) -> None:
    """Invariant I4, seen from both sides."""
    for server in engine.pool.servers:
        if engine.pool.fleet.is_known(server):
            assert engine.pool.outstanding(server) <= max(3, server.cap)
    for simulated in fleet:
        assert simulated.generations <= max(CAPS)


def check_answer(answer: ModelResponse, told: int, restarted: Set[str], *, streaming: bool) -> None:
    """Nothing lost, nothing twice; versions true, in order, and of this run (I8).

    Of a stream that broke off, nobody has said which weights made it, so its versions are said not
    to be exact: where an update landed meanwhile, they are the oldest that they can be; where the
    server had been restarted, and died before it could say so, the tokens are of its first weights.
    """
    tokens, versions = answer.output_tokens.tolist(), answer.output_versions.tolist()
    assert tokens == list(range(EOS + LENGTH - 1, EOS - 1, -1))
    assert len(answer.output_logprobs) == len(versions) == LENGTH
    made = [made_by(float(logprob)) for logprob in answer.output_logprobs]
    assert answer.versions_exact or streaming
    if answer.versions_exact:
        assert versions == made
    else:
        for segment in answer.segments:
            here = slice(segment.start, segment.end)
            for ours, true in zip(versions[here], made[here], strict=True):
                assert ours <= true or (true == 0 and segment.server in restarted)
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
@given(EVENTS, st.sampled_from([None, 1000, 40, 7]), st.sampled_from(DIALECTS), st.booleans())
@example([Event(0.0, "update keep", 0), Event(1.0, "restart", 1)], None, "vllm", False)  # busy
@example(  # an update reaches the new process while it makes tokens with its first weights
    [Event(0.0, "update keep", 0), Event(1.0, "restart", 0), Event(0.02, "rolling update", 0)],
    None,
    "vllm",
    False,
)
@example([Event(0.0, "update keep", 0), Event(1.0, "die", 0)], None, "vllm", True)  # not exact
@example(  # restarted, and dead before the end of a stream could tell that
    [Event(0.0, "update keep", 0), Event(1.0, "restart", 1), Event(0.02, "die", 1)],
    None,
    "vllm",
    True,
)
def test_every_interleaving_gives_what_an_undisturbed_server_gives(
    events: list[Event], segment_tokens: int | None, dialect: Any, streaming: bool
) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(run, events, segment_tokens, dialect, streaming, clock=clock)


async def run(
    events: list[Event], segment_tokens: int | None, dialect: Any, streaming: bool
) -> None:
    servers = [
        SimulatedServerSettings(max_num_seqs=cap, load_time_s=0.4, dialect=dialect) for cap in CAPS
    ]
    answers: list[ModelResponse] = []
    async with open_fleet(servers, lengths=FixedLengths(LENGTH)) as fleet:
        watching = Watching(fleet)
        config = RolloutConfig(
            servers=fleet.addresses,
            backend=dialect,
            vocab_size=2 * EOS,
            streaming=streaming,
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
        check_answer(answer, told, world.restarted, streaming=streaming)
        check_questions(watching.asked, answer, budget, segment_tokens)
