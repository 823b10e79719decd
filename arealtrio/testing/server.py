"""SimulatedServer: one inference server in memory, on trio's clock."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from ..checks import finite, integer
from ..embedded.engine import Generation
from ..embedded.settings import ServerSettings
from ..embedded.vllm_app import vllm_app
from ..embedded.vllm_error import VllmError, engine_error
from ..embedded.vllm_fields import decode_body
from ..embedded.vllm_generate import COMPLETION, TOKENS, Kind, begin, json_response
from ..embedded.vllm_response import Json
from ..errors import ConfigError, ConnectFailed, TransportError, TransportTimeout
from ..types import INT32_MAX, HttpRequest, HttpResponse, TimeLimits
from .asgi import ask
from .clockwork import Pace, TimedEngine, TimedScheduler
from .faults import Faults
from .lengths import Lengths
from .mishap import Mishap
from .script import ScriptedModel, checkpoint

MODEL_NAME = "simulated"
_GENERATE: dict[str, Kind] = {"/v1/completions": COMPLETION, "/inference/v1/generate": TOKENS}
_ABORTS = ("/abort_request", "/abort_requests", "/inference/v1/abort_requests")


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
        for name, least in (("max_num_seqs", 1), ("max_model_len", 2)):
            value = integer(name, getattr(self, name), least, INT32_MAX)
            object.__setattr__(self, name, value)
        for name in ("token_time_s", "speed", "batch_growth", "load_time_s", "latency_s"):
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        for name in ("token_time_s", "speed"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be finite and above 0")
        for name in ("batch_growth", "load_time_s", "latency_s"):
            if getattr(self, name) < 0:
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
        rng: Of the lengths.
        faults: What goes wrong with it.

    Attributes:
        condition: What a client meets there.
        pace: How fast it decodes; assign to its fields to change that.
        generations: Generate requests that it is working on now.
        most_generations: The most it ever worked on at once.
        most_waiting: The most that ever waited in its own queue.
        outage: Grows whenever an outage begins or ends.
        on_change: Called whenever ``generations`` has changed; for checking invariants.
    """

    def __init__(
        self,
        address: str,
        settings: SimulatedServerSettings,
        lengths: Lengths,
        rng: random.Random,
        faults: Faults,
    ) -> None:
        self.address = address
        self.settings = settings
        self.condition = ServerCondition.UP
        self.pace = Pace(settings.token_time_s, settings.batch_growth, settings.speed)
        self.generations = 0
        self.most_generations = 0
        self.most_waiting = 0
        self.on_change: Callable[[SimulatedServer], None] = lambda _: None
        self.outage = 0
        self._lengths = lengths
        self._rng = rng
        self._faults = faults
        self._unreached: trio.Event | None = None  # set when a partition ends
        self._unnoticed: list[Generation] = []  # whose clients left during a partition
        self._deaf_to: list[Generation] = []  # whose clients left, and whose abort is not done
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
        self._unnoticed.clear()
        self._deaf_to.clear()
        self._engine = TimedEngine(
            scheduler,
            settings.load_time_s,
            on_load=lambda: self._faults.on_load(self),
            on_label=lambda asked: self._faults.on_label(self, asked),
        )
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
        self._faults.on_broken(self)

    @property
    def orphans(self) -> int:
        """Sequences that it still works on although their clients have left, by a fault."""
        left = (*self._unnoticed, *self._deaf_to)
        return sum(not one.finished for generation in left for one in generation.sequences)

    @property
    def isolated(self) -> bool:
        """Whether a partition cuts it off."""
        return self._unreached is not None

    @property
    def undisturbed(self) -> bool:
        """Whether it is up and can be reached."""
        return self.condition is ServerCondition.UP and not self.isolated

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

    def slow_down(self, factor: float) -> None:
        """Decode so many times slower than the settings say, until ``speed_up``."""
        self.outage += 1
        self.pace.speed = self.settings.speed / factor

    def speed_up(self) -> None:
        """Decode as fast as the settings say."""
        self.outage += 1
        self.pace.speed = self.settings.speed

    def isolate(self) -> None:
        """Let nothing in or out until ``rejoin``. It does not notice, and goes on with its work."""
        if self._unreached is None:
            self.outage += 1
            self._unreached = trio.Event()

    def rejoin(self) -> None:
        """End a partition: what was held up arrives, and it notices which clients have left."""
        if self._unreached is None:
            return
        self.outage += 1
        self._unreached.set()
        self._unreached = None
        for generation in self._unnoticed:
            self._engine.discard(generation)
        self._unnoticed.clear()

    def mend(self) -> None:
        """End whatever is wrong with it; harmless where nothing is."""
        self.rejoin()
        self.speed_up()
        if self.condition is not ServerCondition.UP:
            self.restart()

    def _change(self, condition: ServerCondition) -> None:
        self._replace(condition)
        for connection in self._connections:
            connection.cancel()

    def _replace(self, condition: ServerCondition) -> None:
        self.outage += 1
        self.condition = condition
        self._boot()
        self._replaced.set()
        self._replaced = trio.Event()

    # --- requests ----------------------------------------------------------------------------

    async def request(
        self,
        request: HttpRequest,
        limits: TimeLimits,
        headers: Sequence[tuple[str, str]] = (),
        mishap: Mishap | None = None,
    ) -> HttpResponse:
        """Answer one request.

        Cancelling it drops what it was working on, as a server does that notices the disconnect.

        Args:
            request: What is asked.
            limits: ``connect_s`` passes in a partition, ``first_byte_s`` and ``total_s`` where the
                answer takes too long: it comes in one piece.
            headers: Further headers, before the request's own.
            mishap: What the answer meets on its way.

        Raises:
            ConnectFailed: It is down.
            TransportTimeout: A limit passed.
            TransportError: It died or restarted meanwhile, or the mishap is a reset.
        """
        name, seconds = _tightest(limits)
        with trio.move_on_after(seconds):
            await self._connect(limits)
            if mishap is not None and (refusal := mishap.refusal()) is not None:
                return refusal
            return await self._talk(request, headers, mishap)
        raise TransportTimeout(
            f"{self.address} did not answer within {name} = {seconds:g} s", limit=name
        )

    async def _connect(self, limits: TimeLimits) -> None:
        await trio.sleep(self.settings.latency_s)
        with trio.move_on_after(limits.connect_s) as connecting:
            await self._reach()
        if connecting.cancelled_caught:
            raise TransportTimeout(
                f"{self.address}: no connection within connect_s = {limits.connect_s:g} s",
                request_sent=False,
                limit="connect_s",
            )
        if self.condition is ServerCondition.DOWN:
            raise ConnectFailed(f"{self.address} refused the connection")

    async def _reach(self) -> None:
        """Wait out a partition."""
        while self._unreached is not None:
            await self._unreached.wait()

    async def _talk(
        self, request: HttpRequest, headers: Sequence[tuple[str, str]], mishap: Mishap | None
    ) -> HttpResponse:
        """Answer on one connection, as long as the server lives that took it."""
        if self.condition is ServerCondition.UP:
            with trio.CancelScope() as connection:
                self._connections[connection] = None
                try:
                    response = await self._answer(request, headers)
                    if mishap is not None:
                        response = await mishap.befall(response)
                    await self._reach()
                    return response
                finally:
                    del self._connections[connection]
        await self._reach()
        if self.condition is ServerCondition.HUNG:
            await self._replaced.wait()
        raise TransportError(f"{self.address} reset the connection")

    async def _answer(
        self, request: HttpRequest, headers: Sequence[tuple[str, str]]
    ) -> HttpResponse:
        """Generate directly: it is what most requests ask, and the application costs thrice it."""
        kind = _GENERATE.get(request.path)
        if kind is None or request.method != "POST":
            return await self._control(request, headers)
        try:
            return await self._generate(kind, request)
        except VllmError as exc:
            return _json(exc.body, exc.status)

    async def _control(
        self, request: HttpRequest, headers: Sequence[tuple[str, str]]
    ) -> HttpResponse:
        if self._deaf_to and self._is_deaf_to(request):
            if not self._faults.on_lost_abort(self):
                await trio.sleep_forever()  # the client's own limit ends it
            return HttpResponse(200, {}, b"")
        return await ask(self._app, request, headers)

    def _is_deaf_to(self, request: HttpRequest) -> bool:
        if request.path not in _ABORTS:
            return False
        body = decode_body(request.body)
        named = [str(body.get("rid", "")), *body.get("request_ids", ())]
        left = [one for generation in self._deaf_to for one in generation.sequences]
        return any(one.request_id in named for one in left if not one.finished)

    async def _generate(self, kind: Kind, request: HttpRequest) -> HttpResponse:
        body = decode_body(request.body)
        header_id = next((v for n, v in request.headers if n.lower() == "x-request-id"), None)
        generation, answer = begin(self._engine, self._face, kind, body, header_id)
        self._count(1)
        try:
            await generation.wait_finished()
        except trio.Cancelled:
            self._part_from(generation)
            raise
        finally:
            self._count(-1)
        if generation.failed:
            raise engine_error()
        return _json(kind.whole(answer))

    def _part_from(self, generation: Generation) -> None:
        """A client left before its generation ended; which a faulty server does not notice."""
        if self.condition is not ServerCondition.UP or not generation.belongs_to(self._engine):
            return  # it is the server that left
        if self.isolated:
            self._unnoticed.append(generation)
        elif self._faults.on_departure(self):
            self._deaf_to.append(generation)
        else:
            self._engine.discard(generation)

    def _count(self, change: int) -> None:
        self.generations += change
        self.most_generations = max(self.most_generations, self.generations)
        self.most_waiting = max(self.most_waiting, len(self.scheduler.waiting))
        self.on_change(self)


def _json(body: Json, status: int = 200) -> HttpResponse:
    response = json_response(body, status)
    return HttpResponse(status, {"content-type": "application/json"}, bytes(response.body))


def _tightest(limits: TimeLimits) -> tuple[str, float]:
    """The limit that passes first where an answer comes in one piece."""
    if limits.first_byte_s < limits.total_s:
        return "first_byte_s", limits.first_byte_s
    return "total_s", limits.total_s
