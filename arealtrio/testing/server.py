"""SimulatedServer: one inference server in memory, on trio's clock."""

from __future__ import annotations

import enum
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import trio

from ..embedded.engine import Generation
from ..embedded.http import Reply, json_bytes
from ..embedded.sequence import Sequence as Sequence_
from ..embedded.settings import ServerSettings
from ..embedded.sglang_error import SglangError
from ..embedded.vllm_error import VllmError
from ..embedded.vllm_fields import decode_body
from ..errors import ConnectFailed, TransportError, TransportTimeout
from ..transport import RESPONSE_SIZE_BYTES_MAX
from ..types import HttpRequest, HttpResponse, TimeLimits
from .amounts import positive
from .asgi import ask, ask_at_once
from .clockwork import Pace, TimedEngine, TimedScheduler
from .faces import face_of
from .faults import Faults
from .lengths import Lengths
from .mishap import Mishap
from .patience import Patience
from .script import ScriptedModel, checkpoint
from .settings import SimulatedServerSettings
from .stream import Connection, Pieces, SimulatedStream
from .timetable import Timetable

MODEL_NAME = "simulated"
_ABORTS = ("/abort_request", "/abort_requests", "/inference/v1/abort_requests")
_EVENT_STREAM = {"content-type": "text/event-stream"}
_JSON = {"content-type": "application/json"}
T = TypeVar("T")


class ServerCondition(enum.Enum):
    """What a client meets at the server's address."""

    UP = "up"
    DOWN = "down"  # connections are refused
    HUNG = "hung"  # connections are accepted, and nothing is ever answered


class _Over(Exception):
    """The server has ended a connection, or the client's time is up."""


class SimulatedServer:
    """One inference server in memory: the embedded server's state machine and its two faces.

    Requests come in through ``request`` and ``stream``, as from a transport. ``die``, ``hang``,
    ``restart``, ``slow_down``, ``isolate`` and their opposites are synchronous and act at once.
    ``open_fleet`` makes it.

    Args:
        address: Its base URL.
        settings: What it is.
        lengths: Of its answers.
        rng: Of the lengths.
        faults: What goes wrong with it.
        timetable: Of the fleet.

    Attributes:
        condition: What a client meets there.
        pace: How fast it decodes; assign to its fields to change that.
        generations: Generate requests that it is working on now.
        most_generations: The most it ever worked on at once.
        most_waiting: The most that ever waited in its own queue.
        outages: Grows whenever it goes down, hangs or comes up.
        partitions: Grows whenever a partition begins or ends.
        paces: Grows whenever its speed changes.
        on_change: Called whenever ``generations`` has changed; for checking invariants.
    """

    def __init__(
        self,
        address: str,
        settings: SimulatedServerSettings,
        lengths: Lengths,
        rng: random.Random,
        faults: Faults,
        timetable: Timetable,
    ) -> None:
        self.address = address
        self.settings = settings
        self.condition = ServerCondition.UP
        self.pace = Pace(settings.token_time_s, settings.batch_growth, settings.speed)
        self.generations = 0
        self.most_generations = 0
        self.most_waiting = 0
        self.on_change: Callable[[SimulatedServer], None] = lambda _: None
        self.outages = self.partitions = self.paces = 0
        self._lengths = lengths
        self._rng = rng
        self._faults = faults
        self._unreached: trio.Event | None = None  # set when a partition ends
        self._unnoticed: list[Reply] = []  # whose clients left during a partition
        self._deaf_to: list[Reply] = []  # whose clients left, and whose abort is not done
        self._connections: dict[Connection, None] = {}  # open; a dict, because it is ordered
        self._timetable = timetable
        self._patience = Patience(timetable)
        self._replaced = trio.Event()  # set: the engine is another one now
        self._boot()

    def _boot(self) -> None:
        """Begin anew: no request, the first weights, the default label."""
        settings = self.settings
        shown = ServerSettings(
            weights=Path(checkpoint(0)),
            served_model_name=MODEL_NAME,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            dialect=settings.dialect,
            fragile=True,
            incremental_streaming_output=True,
        )
        scheduler = TimedScheduler(
            self.pace,
            self._lengths,
            self._rng,
            trio.current_time,
            model=ScriptedModel(0),
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            event_tokens=settings.event_tokens,
        )
        self._unnoticed.clear()
        self._deaf_to.clear()
        self._engine = TimedEngine(
            scheduler,
            settings.load_time_s,
            self._timetable,
            on_death=self._break_down,
            on_load=lambda: self._faults.on_load(self),
            on_label=lambda asked: self._faults.on_label(self, asked),
        )
        self._face = face_of(self._engine, shown)

    @property
    def scheduler(self) -> TimedScheduler:
        """What it runs; for looking only."""
        return self._engine.scheduler

    def _break_down(self) -> None:
        self._replace(ServerCondition.DOWN)  # whoever waited is told so by the dead engine
        self._faults.on_broken(self)

    @property
    def orphans(self) -> int:
        """Sequences that it still works on although their clients have left, by a fault."""
        return sum(1 for _ in _unfinished((*self._unnoticed, *self._deaf_to)))

    @property
    def asleep(self) -> bool:
        """Whether it let go of memory and was not told to take all of it back."""
        return bool(self._face.asleep)

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
        """Decode so many times slower than the settings say, until ``speed_up``.

        Raises:
            ConfigError: The factor is no finite number above 0.
        """
        speed = self.settings.speed / positive("factor", factor)
        self._set_speed(positive("speed / factor", speed))

    def speed_up(self) -> None:
        """Decode as fast as the settings say."""
        self._set_speed(self.settings.speed)

    def _set_speed(self, speed: float) -> None:
        self.paces += 1
        self.scheduler.step()  # what was due by now was made at the old pace
        self.pace.speed = speed
        self._engine.retime()

    def isolate(self) -> None:
        """Let nothing in or out until ``rejoin``. It does not notice, and goes on with its work."""
        if self._unreached is None:
            self.partitions += 1
            self._unreached = trio.Event()

    def rejoin(self) -> None:
        """End a partition: what was held up arrives, and it notices which clients have left."""
        if self._unreached is None:
            return
        self.partitions += 1
        self._unreached.set()
        self._unreached = None
        for reply in self._unnoticed:
            reply.release()
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
            connection.cut()

    def _replace(self, condition: ServerCondition) -> None:
        self.outages += 1
        self.condition = condition
        self._engine.stop()
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
        connection = Connection()
        try:
            answer = await self._open(connection, request, limits, headers, mishap)
            if isinstance(answer, HttpResponse):
                return answer
            return await self._drained(connection, answer)
        finally:
            self._connections.pop(connection, None)

    @asynccontextmanager
    async def stream(
        self,
        request: HttpRequest,
        limits: TimeLimits,
        headers: Sequence[tuple[str, str]] = (),
        mishap: Mishap | None = None,
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> AsyncIterator[SimulatedStream]:
        """Answer one request piece by piece, each as soon as it is made.

        Leaving the block before the end drops what it was working on.

        Args:
            request: What is asked.
            limits: All of them count.
            headers: Further headers, before the request's own.
            mishap: What the answer meets on its way.
            size_bytes_max: Largest body that the client takes.

        Raises:
            ConnectFailed: It is down.
            TransportTimeout: A limit passed; so does the stream.
            TransportError: It died or restarted meanwhile, or the mishap is a reset; so does the
                stream.
        """
        deadline = trio.current_time() + limits.total_s
        bounds = (limits, deadline, size_bytes_max)
        connection = Connection()
        try:
            answer = await self._open(connection, request, limits, headers, mishap)
            if isinstance(answer, HttpResponse):
                whole = Pieces(answer.body)
                yield SimulatedStream(
                    self.address, answer.status, answer.headers, whole.next, *bounds
                )
                return
            read = partial(self._on, connection, answer.next_events)
            if mishap is not None:
                read = partial(mishap.next_piece, read)
            try:
                yield SimulatedStream(self.address, 200, _EVENT_STREAM, read, *bounds)
            finally:
                self._close(answer)
        finally:
            self._connections.pop(connection, None)

    async def _open(
        self,
        connection: Connection,
        request: HttpRequest,
        limits: TimeLimits,
        headers: Sequence[tuple[str, str]],
        mishap: Mishap | None,
    ) -> HttpResponse | Reply:
        """Return the whole answer, or that which will stream it."""
        name, seconds = _tightest(limits)
        deadline = trio.current_time() + seconds
        try:
            await self._connect(connection, deadline, request, limits)
            if mishap is None:
                return await self._respond(connection, deadline, request, headers)
            if (refusal := mishap.refusal()) is not None:
                await trio.lowlevel.checkpoint()
                return refusal
            answer = await self._respond(connection, deadline, request, headers)
            if not isinstance(answer, HttpResponse):
                return answer
            return await self._during(connection, deadline, partial(mishap.befall, answer))
        except _Over:
            pass
        if connection.is_cut:
            with trio.move_on_at(deadline):
                await self._reset()
        raise TransportTimeout(
            f"{self.address} did not answer within {name} = {seconds:g} s", limit=name
        )

    async def _drained(self, connection: Connection, reply: Reply) -> HttpResponse:
        """A stream that nobody wanted to read as one."""
        pieces = []
        try:
            while piece := await self._on(connection, reply.next_events):
                pieces.append(piece)
        finally:
            self._close(reply)
        return HttpResponse(200, _EVENT_STREAM, b"".join(pieces))

    async def _connect(
        self, connection: Connection, deadline: float, request: HttpRequest, limits: TimeLimits
    ) -> None:
        """Get through to the server. Where that takes no time it is no checkpoint either."""
        seconds = self._way_s(request)
        if seconds or self.isolated:
            await self._during(connection, deadline, partial(self._approach, seconds, limits))
        if self.condition is ServerCondition.DOWN:
            await trio.lowlevel.checkpoint()
            raise ConnectFailed(f"{self.address} refused the connection")
        connection.is_cut = self.condition is ServerCondition.HUNG
        self._connections[connection] = None

    def _way_s(self, request: HttpRequest) -> float:
        settings = self.settings
        if settings.prefill_s and self._face.generates(request):
            return settings.latency_s + settings.prefill_s
        return settings.latency_s

    async def _approach(self, seconds: float, limits: TimeLimits) -> None:
        if seconds:
            await trio.sleep(seconds)
        if self.isolated:
            with trio.move_on_after(limits.connect_s) as connecting:
                await self._reach()
            if connecting.cancelled_caught:
                raise TransportTimeout(
                    f"{self.address}: no connection within connect_s = {limits.connect_s:g} s",
                    request_sent=False,
                    limit="connect_s",
                )

    async def _reach(self) -> None:
        """Wait out a partition."""
        while self._unreached is not None:
            await self._unreached.wait()

    async def _reset(self) -> NoReturn:
        """Learn, as a client does, that the server has ended the connection; a hung one says so
        when it is started again.
        """
        await self._reach()
        if self.condition is ServerCondition.HUNG:
            await self._replaced.wait()
        raise TransportError(f"{self.address} reset the connection")

    async def _on(self, connection: Connection, work: Callable[[], Awaitable[bytes]]) -> bytes:
        """Read a piece of a stream, as long as the server lives that took the connection."""

        async def read() -> bytes:
            piece = await work()
            await self._reach()
            return piece

        try:
            return await self._during(connection, math.inf, read)
        except _Over:
            await self._reset()

    async def _during(
        self, connection: Connection, deadline: float, work: Callable[[], Awaitable[T]]
    ) -> T:
        """Wait for something as long as the connection lasts and the client's time.

        Raises:
            _Over: One of them ended.
        """
        if not connection.is_cut:
            with trio.CancelScope(deadline=deadline) as scope:
                connection.end_wait = scope.cancel
                return await work()
        raise _Over

    async def _respond(
        self,
        connection: Connection,
        deadline: float,
        request: HttpRequest,
        headers: Sequence[tuple[str, str]],
    ) -> HttpResponse | Reply:
        if connection.is_cut:
            raise _Over
        answer: HttpResponse | Reply
        try:
            reply = self._face.open(request)
            if reply is None:
                answer = await self._control(connection, deadline, request, headers)
            else:
                self._count(1)
                answer = reply
                if not reply.streamed:
                    answer = await self._whole(connection, deadline, reply)
        except (VllmError, SglangError) as exc:
            await trio.lowlevel.checkpoint()
            answer = HttpResponse(exc.status, _JSON, json_bytes(exc.body))
        if self.isolated:
            await self._during(connection, deadline, self._reach)
        return answer

    async def _whole(self, connection: Connection, deadline: float, reply: Reply) -> HttpResponse:
        try:
            if not reply.start():
                await self._during(connection, deadline, reply.wait)
            elif reply.generation is not None:
                await self._finished(connection, deadline, reply.generation)
            return HttpResponse(200, _JSON, json_bytes(reply.answer()))
        finally:
            self._close(reply)

    async def _finished(
        self, connection: Connection, deadline: float, generation: Generation
    ) -> None:
        """Do what ``_during`` does, for nearly all there is to wait for, at half the price."""
        connection.end_wait = generation.interrupt
        self._patience.watch(connection, deadline)
        try:
            await generation.wait_finished()
        finally:
            self._patience.forget(connection)
        if not generation.finished:
            raise _Over

    async def _control(
        self,
        connection: Connection,
        deadline: float,
        request: HttpRequest,
        headers: Sequence[tuple[str, str]],
    ) -> HttpResponse:
        if self._deaf_to and self._is_deaf_to(request):
            return await self._during(connection, deadline, self._lose_abort)
        if handler := self._face.handler_at_once(request):
            answer = ask_at_once(handler, request, headers)
            await self._send_head_and_body(connection)
            return answer
        asking = partial(ask, self._face.app_for(request), request, headers)
        return await self._during(connection, deadline, asking)

    async def _send_head_and_body(self, connection: Connection) -> None:
        """Take the turns that ``ask`` takes to send an answer, without a scope to end them in.

        Time does not pass in them. A wait that is cancelled takes one turn more to end.
        """
        for _ in ("head", "body"):
            await trio.lowlevel.checkpoint()
            if connection.is_cut:
                await trio.lowlevel.checkpoint()
                raise _Over

    async def _lose_abort(self) -> HttpResponse:
        if not self._faults.on_lost_abort(self):
            await trio.sleep_forever()  # the client's own limit ends it
        return HttpResponse(200, {}, b"")

    def _is_deaf_to(self, request: HttpRequest) -> bool:
        if request.path not in _ABORTS:
            return False
        body = decode_body(request.body)
        named = [str(body.get("rid", "")), *body.get("request_ids", ())]
        return any(one.request_id in named for one in _unfinished(self._deaf_to))

    def _close(self, reply: Reply) -> None:
        """An answer has been sent, or its client has left, which a faulty server does not notice.

        Then it works on, and lets go of it when it has made all of it.
        """
        self._count(-1)
        generation = reply.generation
        if generation is None or generation.finished or not generation.belongs_to(self._engine):
            reply.release()
        elif self.isolated:
            self._keep(reply, self._unnoticed)
        elif self._faults.on_departure(self):
            self._keep(reply, self._deaf_to)
        else:
            reply.release()

    def _keep(self, reply: Reply, among: list[Reply]) -> None:
        def end() -> None:
            reply.release()
            if reply in among:
                among.remove(reply)

        assert reply.generation is not None
        among.append(reply)
        reply.generation.on_end = end

    def _count(self, change: int) -> None:
        self.generations += change
        if self.generations > self.most_generations:
            self.most_generations = self.generations
        if (waiting := self._engine.scheduler.queue_length) > self.most_waiting:
            self.most_waiting = waiting
        self.on_change(self)


def _unfinished(replies: Iterable[Reply]) -> Iterator[Sequence_]:
    """The sequences that are still being made."""
    for reply in replies:
        if reply.generation is not None:
            yield from (one for one in reply.generation.sequences if not one.finished)


def _tightest(limits: TimeLimits) -> tuple[str, float]:
    """The limit that passes first where an answer comes in one piece."""
    if limits.first_byte_s < limits.total_s:
        return "first_byte_s", limits.first_byte_s
    return "total_s", limits.total_s
