"""SimulatedServer: one inference server in memory, on trio's clock."""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from ..embedded.settings import ServerSettings
from ..embedded.vllm_app import vllm_app
from ..embedded.vllm_error import VllmError, engine_error
from ..embedded.vllm_fields import decode_body
from ..embedded.vllm_generate import COMPLETION, TOKENS, Kind, begin, json_response
from ..embedded.vllm_response import Json
from ..errors import ConfigError, ConnectFailed, TransportError, TransportTimeout
from ..types import HttpRequest, HttpResponse, TimeLimits
from .asgi import ask
from .clockwork import Pace, TimedEngine, TimedScheduler
from .lengths import Lengths
from .script import ScriptedModel, checkpoint

MODEL_NAME = "simulated"
_GENERATE: dict[str, Kind] = {"/v1/completions": COMPLETION, "/inference/v1/generate": TOKENS}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServerSettings:
    """What one simulated server is.

    Args:
        max_num_seqs: Sequences decoded at once; more wait in the server's queue.
        token_time_s: Seconds of one decode step with one sequence, above 0.
        batch_growth: By what share of that a step grows with each further sequence.
        speed: Divides the time of a step; 0.5 is half as fast.
        load_time_s: Seconds it takes to load weights.
        latency_s: Seconds between a request's departure and its arrival.
        max_model_len: Prompt and answer together at most, in tokens.

    Raises:
        ConfigError: If a value is out of its range.
    """

    max_num_seqs: int = 8
    token_time_s: float = 0.02
    batch_growth: float = 0.0
    speed: float = 1.0
    load_time_s: float = 0.0
    latency_s: float = 0.0
    max_model_len: int = 100_000

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_model_len < 2:
            raise ConfigError("max_num_seqs must be at least 1 and max_model_len at least 2")
        for name in ("token_time_s", "speed"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and above 0")
        for name in ("batch_growth", "load_time_s", "latency_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and not negative")


class ServerCondition(enum.Enum):
    """What a client meets at the server's address."""

    UP = "up"
    DOWN = "down"  # connections are refused
    HUNG = "hung"  # connections are accepted, and nothing is ever answered


class SimulatedServer:
    """One inference server in memory: the embedded server's state machine and its vLLM face.

    Requests come in through ``request``, as from a transport. ``die``, ``hang`` and ``restart`` are
    synchronous and act at once.

    Args:
        address: Its base URL.
        settings: What it is.
        lengths: Of its answers.
        rng: The source of all chance.

    Attributes:
        condition: What a client meets there.
        pace: How fast it decodes; assign to its fields to change that.
        generations: Generate requests that it is working on now.
        most_generations: The most it ever worked on at once.
        most_waiting: The most that ever waited in its own queue.
        on_change: Called whenever ``generations`` has changed; for checking invariants.
    """

    def __init__(
        self, address: str, settings: SimulatedServerSettings, lengths: Lengths, rng: random.Random
    ) -> None:
        self.address = address
        self.settings = settings
        self.condition = ServerCondition.UP
        self.pace = Pace(settings.token_time_s, settings.batch_growth, settings.speed)
        self.generations = 0
        self.most_generations = 0
        self.most_waiting = 0
        self.on_change: Callable[[SimulatedServer], None] = lambda _: None
        self._lengths = lengths
        self._rng = rng
        self._connections: dict[trio.CancelScope, None] = {}  # open; a dict, because it is ordered
        self._replaced = trio.Event()  # set: the engine is another one now
        self._boot()

    def _boot(self) -> None:
        """Begin anew: no request, the first weights, the default label."""
        settings = self.settings
        self._face = ServerSettings(
            weights=Path(checkpoint(0)),
            served_model_name=MODEL_NAME,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
        )
        scheduler = TimedScheduler(
            self.pace,
            self._lengths,
            self._rng,
            trio.current_time,
            model=ScriptedModel(0),
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
        )
        self._engine = TimedEngine(scheduler, settings.load_time_s)
        self._app = vllm_app(self._engine, self._face)

    @property
    def scheduler(self) -> TimedScheduler:
        """What it runs; for looking only."""
        return self._engine.scheduler

    async def run(self) -> None:
        """Decode for as long as this runs; ``open_fleet`` runs it."""
        while True:
            replaced = self._replaced
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._decode)
                await replaced.wait()
                nursery.cancel_scope.cancel()

    async def _decode(self) -> None:
        engine = self._engine
        await engine.run()  # returns when broken weights have killed it
        self._replace(ServerCondition.DOWN)  # whoever waited is told so by the dead engine

    # --- faults ------------------------------------------------------------------------------

    def die(self) -> None:
        """Reset every connection and refuse new ones, until ``restart``. All state is lost."""
        self._change(ServerCondition.DOWN)

    def hang(self) -> None:
        """Answer nothing any more, until ``restart`` or ``die``. Connections stay open."""
        self._change(ServerCondition.HUNG)

    def restart(self) -> None:
        """Come up at once with the first weights and the default label; open connections reset."""
        self._change(ServerCondition.UP)

    def _change(self, condition: ServerCondition) -> None:
        self._replace(condition)
        for connection in self._connections:
            connection.cancel()

    def _replace(self, condition: ServerCondition) -> None:
        self.condition = condition
        self._boot()
        self._replaced.set()
        self._replaced = trio.Event()

    # --- requests ----------------------------------------------------------------------------

    async def request(
        self, request: HttpRequest, limits: TimeLimits, headers: Sequence[tuple[str, str]] = ()
    ) -> HttpResponse:
        """Answer one request.

        Cancelling it drops what it was working on, as a server does that notices the disconnect.

        Args:
            request: What is asked.
            limits: Only the whole counts.
            headers: Further headers, before the request's own.

        Raises:
            ConnectFailed: It is down.
            TransportTimeout: ``total_s`` passed.
            TransportError: It died or restarted meanwhile.
        """
        with trio.move_on_after(limits.total_s):
            await trio.sleep(self.settings.latency_s)
            if self.condition is ServerCondition.DOWN:
                raise ConnectFailed(f"{self.address} refused the connection")
            return await self._talk(request, headers)
        raise TransportTimeout(f"{self.address} did not answer within {limits.total_s:g} s")

    async def _talk(self, request: HttpRequest, headers: Sequence[tuple[str, str]]) -> HttpResponse:
        """Answer on one connection, as long as the server lives that took it."""
        if self.condition is ServerCondition.UP:
            with trio.CancelScope() as connection:
                self._connections[connection] = None
                try:
                    return await self._answer(request, headers)
                finally:
                    del self._connections[connection]
        if self.condition is ServerCondition.HUNG:
            await self._replaced.wait()
        raise TransportError(f"{self.address} reset the connection")

    async def _answer(
        self, request: HttpRequest, headers: Sequence[tuple[str, str]]
    ) -> HttpResponse:
        """Generate directly: it is what most requests ask, and the application costs thrice it."""
        kind = _GENERATE.get(request.path)
        if kind is None or request.method != "POST":
            return await ask(self._app, request, headers)
        try:
            return await self._generate(kind, request)
        except VllmError as exc:
            return _json(exc.body, exc.status)

    async def _generate(self, kind: Kind, request: HttpRequest) -> HttpResponse:
        body = decode_body(request.body)
        header_id = next((v for n, v in request.headers if n.lower() == "x-request-id"), None)
        generation, answer = begin(self._engine, self._face, kind, body, header_id)
        self._count(1)
        try:
            with generation:
                await generation.wait_finished()
        finally:
            self._count(-1)
        if generation.failed:
            raise engine_error()
        return _json(kind.whole(answer))

    def _count(self, change: int) -> None:
        self.generations += change
        self.most_generations = max(self.most_generations, self.generations)
        self.most_waiting = max(self.most_waiting, len(self.scheduler.waiting))
        self.on_change(self)


def _json(body: Json, status: int = 200) -> HttpResponse:
    response = json_response(body, status)
    return HttpResponse(status, {"content-type": "application/json"}, bytes(response.body))
