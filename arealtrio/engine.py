"""RemoteEngine: one generation, from a prompt to tokens, on servers that stop and go on.

A generation is a loop of segments. Each leases a server, asks for the tokens that are still missing
with prompt + tokens so far, and ends when the model stops or the budget is used. A server that is
told to abort gives back what it has, and the loop goes on from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from ._core import vectors
from .affinity import Affinity
from .config import RolloutConfig
from .errors import (
    ConfigError,
    InvalidRequest,
    ProtocolError,
    RequestRejected,
    ResponseTooLarge,
    RolloutClosed,
    RolloutError,
    ServerError,
    TransportError,
    UsageError,
)
from .generation import Generation, Progress
from .joining import join
from .lora import unload_retired
from .memory import Memory
from .ordering import Origin
from .pressure import relieve_pressure
from .provenance import versions_of
from .restarts import take_out_if_restarted
from .servers import Lease, Server, ServerPool, ServerState, ServerStatistics
from .supervision import supervise
from .tally import EngineStatistics, Tally
from .transport import HttpTransport, StreamedResponse, Transport, ensure_descriptors, trust
from .types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    Int32Array,
    ModelRequest,
    ModelResponse,
    PauseMode,
)
from .waiting import background
from .wire.dialect import Dialect, SegmentRequest, SegmentResponse, StreamParser
from .wire.sglang import SglangDialect
from .wire.vllm import VllmDialect
from .wire.vllm_areal import ArealVllmDialect

NOT_FOUND = 404  # the route, or the model that is named (RFC 9110 §15.5.5)
UNAVAILABLE = 503  # not now (RFC 9110 §15.6.4): the request was not begun


class RemoteEngine:
    """Generates on a pool of inference servers.

    Args:
        pool: The servers.
        config: Limits.
    """

    def __init__(self, pool: ServerPool, config: RolloutConfig) -> None:
        self.pool = pool
        self.memory = Memory(pool)
        self.config = config
        self._tally = Tally()
        self._affinity = Affinity(config.affinity_size, pool.fleet.serves)
        self._limits = config.segment_limits()
        self._limits_of_streams = config.segment_limits(streamed=True)
        self._warned_of_logprobs = False
        self._rid_stem = secrets.token_hex(12)  # drawn once: the system is asked for it
        self._rid_numbers = itertools.count()
        self._now = trio.lowlevel.current_clock().current_time

    def get_version(self) -> int:
        """The weight version that every server in service has (AReaL's name)."""
        return self.pool.version

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """Every server's numbers at this moment."""
        return self.pool.statistics()

    def totals(self) -> EngineStatistics:
        """The numbers of all generations so far."""
        return EngineStatistics(
            **dataclasses.asdict(self._tally),
            affinity_hits=self._affinity.hits,
            affinity_spills=self._affinity.spills,
            affinity_moves=self._affinity.moves,
        )

    def paused(self, mode: PauseMode = "keep") -> AbstractAsyncContextManager[dict[str, str]]:
        """Stop generation on every server for the length of an ``async with`` block.

        See ``Pausing.paused``.
        """
        return self.pool.pausing.paused(mode)

    async def offload(self, *, keep_weights: bool = True, drain: bool = False) -> dict[str, str]:
        """Put every server to sleep until ``onload``. See ``Memory.offload``."""
        return await self.memory.offload(keep_weights=keep_weights, drain=drain)

    async def onload(self, tags: Sequence[str] | None = None) -> dict[str, str]:
        """Wake what sleeps, or a part of it. See ``Memory.onload``."""
        return await self.memory.onload(tags)

    def offloaded(
        self, *, keep_weights: bool = True, drain: bool = False
    ) -> AbstractAsyncContextManager[dict[str, str]]:
        """Lend the servers' GPUs to the trainer for an ``async with`` block.

        See ``Memory.offloaded``.
        """
        return self.memory.offloaded(keep_weights=keep_weights, drain=drain)

    async def agenerate(
        self,
        request: ModelRequest,
        *,
        min_version: int = 0,
        prompt_id: str | None = None,
        session: str | None = None,
        progress: Progress | None = None,
    ) -> ModelResponse:
        """Generate one answer.

        A server that dies, resets, times out, answers 5xx or nonsense, or refuses for a reason
        that is not the request's, costs time only: the generation goes on elsewhere with the
        tokens it has, at the head of the queue, up to ``max_failovers`` times. With
        ``segment_tokens`` no more than that many are made again; with ``streaming``, none of those
        that came.

        Cancelling it, at any moment, gives the slot back, closes the connection, and asks the
        server that owns the request to abort it, for at most ``abort_timeout_s``.

        Args:
            request: What to generate.
            min_version: Only servers with weights at least this new; the executor passes the
                version of the rollout's permit, so that no token is older than it.
            prompt_id: Of the rollout's prompt, the same in every epoch; None takes the request's
                ``session``. It matters to ``queue_order="longest_expected"`` alone.
            session: For a request that names none.
            progress: Is told of it while it runs.

        Returns:
            Tokens, logprobs and versions of one length.

        Raises:
            InvalidRequest: If no server should see this request; nothing was sent.
            RequestRejected: If a server refused the request for what it asks (4xx); it is never
                sent again.
            RolloutError: If ``max_failovers`` or ``max_interruptions`` is used up, or if going on
                would not be exact.
        """
        origin = Origin(prompt_id or request.session, min_version)
        generation = self._plan(request, origin, request.session or session)
        started = self._now()
        setbacks = 0  # fail-overs since it last got an answer
        progress = progress or Progress()
        progress.began(generation)
        try:
            while not generation.finished:
                before = generation.failovers
                await self._run_on_one_server(generation)
                generation.lease = None
                setbacks = setbacks + 1 if generation.failovers > before else 0
                if setbacks > 1:  # not at once again: what is wrong may be wrong everywhere
                    await trio.sleep(self._backoff_s(setbacks))
        except BaseException:
            self._tally.tokens_discarded += generation.count
            self._tally.tokens_lost += generation.arrived.count if generation.arrived else 0
            raise
        finally:
            progress.ended(generation)
        if generation.server is not None:
            self._affinity.follow(generation.session, generation.server)
        self.pool.answered(generation.origin, generation.count)
        return generation.response(latency_s=self._now() - started)

    # --- before anything is sent ---------------------------------------------------------------

    def _plan(self, request: ModelRequest, origin: Origin, session: str | None) -> Generation:
        gconfig, prompt = request.gconfig, request.input_ids
        if gconfig.n_samples != 1:
            raise InvalidRequest(
                f"n_samples is {gconfig.n_samples}; a request is one answer, "
                "ask for several with group_size"
            )
        if not len(prompt) and not request.messages:
            raise InvalidRequest("the prompt is empty")
        self._check_vocabulary(prompt)
        self._check_logprobs(gconfig)
        if gconfig.return_routed_experts:
            self._check_experts()
        budget = self._budget(len(prompt), gconfig)
        return Generation(request, request.rid or self._fresh_rid(), budget, origin, session)

    def _fresh_rid(self) -> str:
        """An id that no other request has, of this engine or of another; all are of one length."""
        return f"{self._rid_stem}{next(self._rid_numbers):010x}"

    def _check_vocabulary(self, prompt: Int32Array) -> None:
        size = self.config.vocab_size or self.pool.fleet.smallest("vocab_size")
        if size is None or not len(prompt):
            return
        largest = vectors.largest(prompt)
        if largest >= size:
            raise InvalidRequest(
                f"the prompt holds the token id {largest}, but the vocabulary ends at {size - 1}"
            )

    def _check_logprobs(self, gconfig: GenerationHyperparameters) -> None:
        """Warn, once, where the logprobs may not be those of the policy that was sampled from.

        No error: what a trainer makes of them, or whether it computes its own, is not known here.
        """
        if self._warned_of_logprobs or gconfig.greedy or gconfig.temperature in (0, 1):
            return
        doubtful = [s for s in self.pool.in_service if not s.info.logprobs_tempered]
        if not doubtful:
            return
        self._warned_of_logprobs = True
        told = doubtful[0].info.logprobs_tempered is False
        what = "gives logprobs" if told else "does not say that it gives no logprobs"
        warnings.warn(
            f"{doubtful[0].address} {what} from before the temperature, which is "
            f"{gconfig.temperature:g}: they are not of the distribution that is sampled from. "
            "Start vLLM with --logprobs-mode processed_logprobs",
            stacklevel=4,
        )

    def _check_experts(self) -> None:
        silent = [s.address for s in self.pool.in_service if s.info.tells_experts is False]
        if silent:
            raise InvalidRequest(
                f"routed experts are asked for, and {', '.join(silent)} can not tell them; start "
                "every server with --enable-return-routed-experts"
            )

    def _budget(self, prompt_len: int, gconfig: GenerationHyperparameters) -> int:
        """New tokens that there is room for: vLLM would clamp silently, so it is decided here."""
        room = gconfig.max_tokens - prompt_len
        model_len = self.pool.fleet.smallest("max_model_len")
        if model_len is not None:
            room = min(room, model_len - prompt_len)
        if room < 1:
            raise InvalidRequest(
                f"no room for new tokens: the prompt has {prompt_len}, max_tokens is "
                f"{gconfig.max_tokens}, the model's length is {model_len or 'not known'}"
            )
        return min(room, gconfig.max_new_tokens)

    # --- on one server -------------------------------------------------------------------------

    async def _run_on_one_server(self, generation: Generation) -> None:
        """Run segments in one slot until the answer ends, or goes on elsewhere."""
        with await self.pool.lease(
            exclude=generation.failed_on,
            min_version=generation.lowest_admissible_version,
            prefer=generation.server or self._affinity.home(generation.session),
            at_head=generation.under_way,
            origin=generation.origin,
        ) as lease:
            generation.wait_s += lease.waited_s
            if not generation.under_way:
                self._affinity.settle(generation.session, lease.server.address)
            while await self._run_segment(generation, lease) and self._stays(generation, lease):
                self._tally.joints_kept += 1

    def _stays(self, generation: Generation, lease: Lease) -> bool:
        """Whether a generation goes on in its slot, whoever waits: its prefix is cached there.

        It gives it up where its server takes no requests now, or has more than it may, and where
        another has so much less to do that computing the prefix again is worth it.
        """
        if generation.finished:
            return False
        least = generation.lowest_admissible_version
        if not self.pool.renew(lease, least):
            return False
        idler = self.pool.clearly_idler(lease.server, least)
        if idler is not None:
            generation.server = idler
            self._tally.joints_moved += 1
        return idler is None

    # --- one segment ---------------------------------------------------------------------------

    async def _run_segment(self, generation: Generation, lease: Lease) -> bool:
        """Ask for a segment and take it; False where its server failed it."""
        adapter_name = generation.request.gconfig.lora_name
        with self.pool.adapters.using(adapter_name) as adapter:
            if self.pool.adapters.is_versioned(adapter_name):
                lease.adapter_version = self.pool.version
            segment = generation.next_segment(self.config, lease, adapter)
            arrived = self._parser_for(lease.server, generation)
            generation.lease, generation.arrived = lease, arrived
            answer: SegmentResponse | None = None
            try:
                answer = await self._ask(lease, segment, arrived)
                self._take(generation, lease, segment, answer)
                generation.arrived = None
            except ResponseTooLarge:  # it would be as large anywhere
                raise
            except (TransportError, ServerError, ProtocolError, RequestRejected) as exc:
                if isinstance(exc, RequestRejected) and not await self._is_the_servers(
                    exc, lease, segment
                ):
                    raise
                generation.arrived = None
                if lease.version <= lease.server.version:  # else it went back, as it was told to
                    self.pool.ejection.failed(lease.server, exc)
                if answer is not None:
                    self._lose(generation, len(answer.token_ids))
                elif arrived is None:
                    generation.expect_again(_made_at_most(segment, exc))
                else:
                    self._salvage(generation, lease, segment, arrived, exc)
                self._fail_over(generation, lease.server, exc)
                return False
        self.pool.ejection.succeeded(lease.server)
        if generation.stop_reason == "abort" and not generation.finished:
            self._check_interruptions(generation)
        return True

    async def _is_the_servers(
        self, refusal: RequestRejected, lease: Lease, segment: SegmentRequest
    ) -> bool:
        """Whether a refusal is for the state of the server, and says nothing of the request.

        A server that was restarted has no adapter that the pool gave it, perhaps not the route, or
        other limits. A model, or an adapter that no update brought, is the caller's to name right.
        """
        named = lease.adapter_version is None and (segment.gconfig.lora_name or self.config.model)
        misnamed = refusal.status == NOT_FOUND and named
        if await self._can_not_judge(lease.server):
            return True
        return not refusal.is_of_the_content and not misnamed

    async def _can_not_judge(self, server: Server) -> bool:
        """Whether a server is not the one that the pool takes it for, or does not even tell."""
        try:
            return await take_out_if_restarted(self.pool, server)
        except RolloutError:
            return True

    def _parser_for(self, server: Server, generation: Generation) -> StreamParser | None:
        """Where a streamed answer is collected; None to ask for it in one piece.

        Experts come with the last token alone, and no token is kept without them; nor can a chat
        go on from those that came.
        """
        whole = generation.wants_experts or bool(generation.request.messages)
        wanted = self.config.streaming and not whole
        if wanted and server.info.streams_news:
            return self.pool.dialect.stream_parser(self.config.secrets_of(server.address))
        return None

    def _take(
        self, generation: Generation, lease: Lease, segment: SegmentRequest, answer: SegmentResponse
    ) -> None:
        """Append an answer to its generation, or raise ProtocolError and change nothing."""
        versions, exact = versions_of(self.pool, lease, answer)
        if generation.wants_experts and answer.stop_reason == "abort":
            answer, versions = self._without_lost(generation, answer, versions)
        generation.take(lease.server.address, segment, answer, versions, exact)
        self._tally.tokens_generated += len(answer.token_ids)
        self._tally.tokens_regenerated += generation.made_again(len(answer.token_ids))

    def _without_lost(
        self, generation: Generation, answer: SegmentResponse, versions: Int32Array
    ) -> tuple[SegmentResponse, Int32Array]:
        """An aborted answer; without its tokens, where their experts were not told."""
        count = len(answer.token_ids)
        if answer.routed_experts is not None or not count:
            return answer, versions
        self._lose(generation, count)
        return answer.without_tokens(), versions[:0]

    def _lose(self, generation: Generation, count: int) -> None:
        """Count tokens that came and can not be used; others are made in their place."""
        self._tally.tokens_lost += count
        generation.expect_again(count)

    def _salvage(
        self,
        generation: Generation,
        lease: Lease,
        segment: SegmentRequest,
        arrived: StreamParser,
        error: RolloutError,
    ) -> None:
        """Keep what a failed server had streamed, or note that it has to be made again.

        Which weights made it is what the server had when it was asked. Its report, which comes with
        the last token, did not come: a process that was started in between has other weights.
        """
        if not arrived.count:
            return
        try:
            if self._may_keep(generation, lease.server, error):
                self._take(generation, lease, segment, arrived.arrived())
                generation.exact &= lease.adapter_version is not None
                return
        except ProtocolError as exc:  # they do not fit what it has: older weights, too many
            error.add_note(f"what it had streamed was dropped: {exc}")
        self._lose(generation, arrived.count)

    def _may_keep(self, generation: Generation, server: Server, error: RolloutError) -> bool:
        """Whether streamed tokens are what they seem, and a generation can go on from them.

        Not if the server breaks the protocol, nor if it is out of service because its weights are
        not known. Where going on would not be exact, making them again is.
        """
        doubtful = server.tainted or server.state is ServerState.STALE
        known = not isinstance(error, ProtocolError) and not doubtful
        return known and not generation.obstacle(self.config)

    def _fail_over(self, generation: Generation, server: Server, error: RolloutError) -> None:
        """Let the generation go on elsewhere with the tokens it has, or raise why it can not."""
        generation.failovers += 1
        generation.failed_on = frozenset({server.address})
        if generation.finished:  # its last token had come, and only the word on that had not
            return
        if generation.failovers > self.config.max_failovers:
            error.add_note(f"after {self.config.max_failovers} fail-overs (max_failovers)")
            raise error
        self._check_may_resume(generation, error)
        self._tally.failovers += 1
        server.failovers += 1
        self._tally.tokens_kept += generation.count
        server.tokens_kept += generation.count

    def _backoff_s(self, setbacks: int) -> float:
        doubled = self.config.failover_interval_s * 2.0 ** min(setbacks - 2, 60)
        return min(doubled, self.config.probe_interval_max_s)

    async def _ask(
        self, lease: Lease, segment: SegmentRequest, arrived: StreamParser | None
    ) -> SegmentResponse:
        server, dialect = lease.server, self.pool.dialect
        request = dialect.generate(segment, server.info, stream=arrived is not None)
        server.requests += 1
        done = False
        try:
            with server.attached():
                response = await self._exchange(server, request, arrived)
            done = True
        except TransportError as exc:
            done = not exc.request_sent
            raise
        finally:
            if not done:
                await self._abort(lease, segment)
        try:
            if response is None:
                assert arrived is not None
                return arrived.answer()
            return dialect.parse_generate(response, server.info, chat=bool(segment.messages))
        except (ServerError, ProtocolError, RequestRejected) as exc:
            exc.add_note(f"server: {server.address}")
            raise

    async def _exchange(
        self, server: Server, request: HttpRequest, arrived: StreamParser | None
    ) -> HttpResponse | None:
        """Return the whole answer; None where it was a stream, and is in ``arrived`` now."""
        if arrived is None:
            return await self.pool.send(server, request, self._limits)
        async with self.pool.stream(server, request, self._limits_of_streams) as response:
            if not _is_event_stream(response):  # a refusal, or a proxy that collects
                body = b"".join([piece async for piece in response.chunks()])
                whole = HttpResponse(response.status, response.headers, body)
                return self.pool.without_keys(server, whole)
            try:
                async for piece in response.chunks():
                    arrived.feed(piece)
            except TransportError:
                if not arrived.complete:
                    raise
        return None

    async def _abort(self, lease: Lease, segment: SegmentRequest) -> None:
        """Ask the server that owns a request to drop it.

        A closed connection alone is not trusted to do that. The lease is held meanwhile: until it
        is aborted the request takes one of the server's slots. The answer does not matter: the
        request may have ended, a dead server has nothing to abort, and over a transport that was
        closed none can be told. What it is sent for is raised by whoever calls this.
        """
        self._tally.aborts_sent += 1
        request = self.pool.dialect.abort(
            segment.request_id, lease.server.info, chat=bool(segment.messages)
        )
        with self.pool.brief.bounded(shield=True):
            try:
                await self.pool.control(lease.server, request, self.config.abort_timeout_s)
            except (RolloutError, RolloutClosed, UsageError):
                return

    def _check_interruptions(self, generation: Generation) -> None:
        generation.interruptions += 1
        self._tally.interruptions += 1
        if generation.interruptions > self.config.max_interruptions:
            raise RolloutError(
                f"the generation was aborted {generation.interruptions} times by its servers; "
                f"max_interruptions is {self.config.max_interruptions}"
            )
        self._check_may_resume(generation, None)

    def _check_may_resume(self, generation: Generation, cause: RolloutError | None) -> None:
        kept = generation.obstacle(self.config)
        if generation.count and kept:
            raise RolloutError(
                f"the generation was interrupted and uses {kept}, which a server keeps per "
                "request: going on elsewhere would not give what an undisturbed server gives. "
                "Pause with mode='keep'"
                + ("" if generation.request.messages else ", or set allow_inexact_resume=True")
            ) from cause


def _made_at_most(segment: SegmentRequest, error: RolloutError) -> int:
    """Tokens that a server may have made that failed without a word on them."""
    never_began = isinstance(error, TransportError) and not error.request_sent
    busy = isinstance(error, ServerError) and error.status == UNAVAILABLE
    refused = busy or isinstance(error, RequestRejected)
    return 0 if never_began or refused else segment.max_new_tokens


def _is_event_stream(response: StreamedResponse) -> bool:
    """Whether tokens come in it; a gateway may send a refusal as an event, too."""
    kind = response.headers.get("content-type", "").lower()
    return response.status < 300 and kind.startswith("text/event-stream")


def make_dialect(backend: str) -> Dialect:
    """The dialect of a ``backend``.

    Raises:
        ConfigError: For a name that is none.
    """
    dialects: dict[str, Callable[[], Dialect]] = {
        "vllm": VllmDialect,
        "sglang": SglangDialect,
        "vllm_areal": ArealVllmDialect,
    }
    if backend not in dialects:
        raise ConfigError(f"backend must be one of {', '.join(dialects)}, not {backend!r}")
    return dialects[backend]()


@asynccontextmanager
async def open_engine(
    config: RolloutConfig, *, transport: Transport | None = None, dialect: Dialect | None = None
) -> AsyncIterator[RemoteEngine]:
    """Connect to the servers of ``config`` and keep an engine for the length of the block.

    Leaving it closes every connection. Requests still in flight belong to tasks of the caller.

    Args:
        config: Servers and limits.
        transport: How bytes travel; None makes an ``HttpTransport`` of its own and closes it.
        dialect: None makes the one that ``config.backend`` names.

    Raises:
        ConfigError: If a server would not survive a token id outside the vocabulary, and neither
            ``config.vocab_size`` nor the server says where that ends; or ``ca_file`` is none.
        NoServerAvailable: If a server is not ready within ``setup_timeout_s``.

    Warns:
        UserWarning: If ``config.streaming`` is set and a server's stream is not worth reading.
    """
    own = transport is None
    if transport is None:
        ensure_descriptors(_descriptors_needed(config))
        transport = HttpTransport(ssl_context=trust(config.ca_file))
    try:
        pool = ServerPool(config, dialect or make_dialect(config.backend), transport)
        with pool.open():
            await join(pool)
            _check_vocabulary_is_known(pool)
            _warn_of_cumulative_streams(pool)
            async with background(supervise, pool) as nursery:
                if config.adaptive_caps:
                    nursery.start_soon(relieve_pressure, pool)
                nursery.start_soon(unload_retired, pool)
                engine = RemoteEngine(pool, config)
                try:
                    yield engine
                finally:
                    await _wake_and_resume_at_the_end(engine)
    finally:
        if own:
            with trio.CancelScope(shield=True):
                await transport.aclose()


async def _wake_and_resume_at_the_end(engine: RemoteEngine) -> None:
    """Leave no server asleep or paused that was made so here."""
    if engine.memory.is_lent:
        await engine.memory.close()
    with trio.move_on_after(engine.config.close_timeout_s, shield=True):
        await engine.pool.pausing.resume_held()


def _check_vocabulary_is_known(pool: ServerPool) -> None:
    """One prompt with an unknown id would end such a server, and every generation on it."""
    if pool.config.vocab_size is not None or not pool.dialect.dies_of_unknown_ids:
        return
    silent = [s.address for s in pool.servers if s.info.vocab_size is None]
    if silent:
        raise ConfigError(
            f"set RolloutConfig(vocab_size=…): {pool.dialect.name} does not survive a token id "
            f"outside its vocabulary, and does not say how large that is ({', '.join(silent)})"
        )


def _warn_of_cumulative_streams(pool: ServerPool) -> None:
    whole = [s.address for s in pool.servers if not s.info.streams_news]
    if pool.config.streaming and whole:
        warnings.warn(
            f"answers of {', '.join(whole)} are not streamed: each event would repeat all tokens. "
            "Start SGLang with --incremental-streaming-output",
            stacklevel=2,
        )


def _descriptors_needed(config: RolloutConfig) -> int:
    rollouts = config.max_concurrent_rollouts or config.consumer_batch_size
    return rollouts + 4 * len(config.servers) + 64
