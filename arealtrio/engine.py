"""RemoteEngine: one generation, from a prompt to tokens, on servers that stop and go on.

A generation is a loop of segments. Each leases a server, asks for the tokens that are still missing
with prompt + tokens so far, and ends when the model stops or the budget is used. A server that is
told to abort gives back what it has, and the loop goes on from there.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import trio

from .config import RolloutConfig
from .errors import (
    ConfigError,
    InvalidRequest,
    ProtocolError,
    RolloutError,
    ServerError,
    TransportError,
)
from .ordering import Origin
from .servers import IN_SERVICE, Lease, Server, ServerPool, ServerStatistics
from .supervision import supervise
from .transport import HttpTransport, Transport, ensure_descriptors
from .types import (
    PROMPT_VERSION,
    Float32Array,
    GenerationHyperparameters,
    Int32Array,
    ModelRequest,
    ModelResponse,
    PauseMode,
    Segment,
    StopReason,
)
from .waiting import background
from .wire.dialect import Dialect, SegmentRequest, SegmentResponse, VersionSpan
from .wire.sglang import SglangDialect
from .wire.vllm import VllmDialect

Scalar = TypeVar("Scalar", np.int32, np.float32)


class RemoteEngine:
    """Generates on a pool of inference servers.

    Args:
        pool: The servers.
        config: Limits.

    Attributes:
        failovers: Times that a generation went on after its server failed.
        tokens_kept: Tokens that those generations had, and did not have to make again.
    """

    def __init__(self, pool: ServerPool, config: RolloutConfig) -> None:
        self.pool = pool
        self.config = config
        self.failovers = 0
        self.tokens_kept = 0

    def get_version(self) -> int:
        """The weight version that every server in service has (AReaL's name)."""
        return self.pool.version

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """Every server's numbers at this moment."""
        return self.pool.statistics()

    def paused(self, mode: PauseMode = "keep") -> AbstractAsyncContextManager[dict[str, str]]:
        """Stop generation on every server for the length of an ``async with`` block.

        See ``ServerPool.paused``.
        """
        return self.pool.paused(mode)

    async def agenerate(
        self, request: ModelRequest, *, min_version: int = 0, prompt_id: str | None = None
    ) -> ModelResponse:
        """Generate one answer.

        A server that dies, resets, times out, answers 5xx or nonsense costs time only: the
        generation goes on elsewhere with the tokens it has, at the head of the queue, up to
        ``max_failovers`` times. With ``segment_tokens`` no more than that many are made again.

        Cancelling it, at any moment, gives the slot back, closes the connection, and asks the
        server that owns the request to abort it, for at most ``abort_timeout_s``.

        Args:
            request: What to generate.
            min_version: Only servers with weights at least this new; the executor passes the
                version of the rollout's permit, so that no token is older than it.
            prompt_id: Of the rollout's prompt, the same in every epoch; None takes the request's
                ``session``. It matters to ``queue_order="longest_expected"`` alone.

        Returns:
            Tokens, logprobs and versions of one length.

        Raises:
            InvalidRequest: If no server should see this request; nothing was sent.
            RequestRejected: If a server refused the request (4xx); it is never sent again.
            RolloutError: If ``max_failovers`` or ``max_interruptions`` is used up, or if going on
                would not be exact.
        """
        generation = self._plan(request, Origin(prompt_id or request.session, min_version))
        started = trio.current_time()
        setbacks = 0  # fail-overs since it last got an answer
        while not generation.finished:
            before = generation.failovers
            await self._run_segment(generation)
            setbacks = setbacks + 1 if generation.failovers > before else 0
            if setbacks > 1:  # not at once again: what is wrong may be wrong everywhere
                await trio.sleep(self._backoff_s(setbacks))
        self.pool.answered(generation.origin, generation.count)
        return generation.response(latency_s=trio.current_time() - started)

    # --- before anything is sent ---------------------------------------------------------------

    def _plan(self, request: ModelRequest, origin: Origin) -> _Generation:
        gconfig, prompt = request.gconfig, request.input_ids
        if gconfig.n_samples != 1:
            raise InvalidRequest(
                f"n_samples is {gconfig.n_samples}; a request is one answer, "
                "ask for several with group_size"
            )
        if not len(prompt):
            raise InvalidRequest("the prompt is empty")
        self._check_vocabulary(prompt)
        budget = self._budget(len(prompt), gconfig)
        return _Generation(request, request.rid or uuid.uuid4().hex, budget, origin)

    def _check_vocabulary(self, prompt: Int32Array) -> None:
        size = self.config.vocab_size or self.pool.smallest("vocab_size")
        if size is not None and int(prompt.max()) >= size:
            raise InvalidRequest(
                f"the prompt holds the token id {int(prompt.max())}, "
                f"but the vocabulary ends at {size - 1}"
            )

    def _budget(self, prompt_len: int, gconfig: GenerationHyperparameters) -> int:
        """New tokens that there is room for: vLLM would clamp silently, so it is decided here."""
        room = gconfig.max_tokens - prompt_len
        model_len = self.pool.smallest("max_model_len")
        if model_len is not None:
            room = min(room, model_len - prompt_len)
        if room < 1:
            raise InvalidRequest(
                f"no room for new tokens: the prompt has {prompt_len}, max_tokens is "
                f"{gconfig.max_tokens}, the model's length is {model_len or 'not known'}"
            )
        return min(room, gconfig.max_new_tokens)

    # --- one segment ---------------------------------------------------------------------------

    async def _run_segment(self, generation: _Generation) -> None:
        asked = trio.current_time()
        with await self.pool.lease(
            exclude=generation.failed_on,
            min_version=generation.lowest_admissible_version,
            prefer=generation.server,
            at_head=generation.under_way,
            origin=generation.origin,
        ) as lease:
            generation.wait_s += trio.current_time() - asked
            segment = generation.next_segment(self.config, lease)
            try:
                answer = await self._ask(lease, segment)
                versions, exact = self._versions(lease, answer)
                generation.take(lease.server.address, segment, answer, versions, exact)
            except (TransportError, ServerError, ProtocolError) as exc:
                self.pool.failed(lease.server, exc)
                self._fail_over(generation, lease.server, exc)
                return
        self.pool.succeeded(lease.server)
        if generation.stop_reason == "abort" and not generation.finished:
            self._check_interruptions(generation)

    def _fail_over(self, generation: _Generation, server: Server, error: RolloutError) -> None:
        """Let the generation go on elsewhere with the tokens it has, or raise why it can not."""
        generation.failovers += 1
        generation.failed_on = frozenset({server.address})
        if generation.failovers > self.config.max_failovers:
            error.add_note(f"after {self.config.max_failovers} fail-overs (max_failovers)")
            raise error
        self._check_may_resume(generation, error)
        self.failovers += 1
        server.failovers += 1
        self.tokens_kept += generation.count
        server.tokens_kept += generation.count

    def _backoff_s(self, setbacks: int) -> float:
        doubled = self.config.failover_interval_s * 2.0 ** min(setbacks - 2, 60)
        return min(doubled, self.config.probe_interval_max_s)

    async def _ask(self, lease: Lease, segment: SegmentRequest) -> SegmentResponse:
        server, dialect = lease.server, self.pool.dialect
        request = dialect.generate(segment, server.info)
        server.requests += 1
        done = False
        try:
            with self.pool.attached(server):
                response = await self.pool.send(server, request, self.config.segment_limits())
            done = True
        except TransportError as exc:
            done = not exc.request_sent
            raise
        finally:
            if not done:
                await self._abort(lease, segment.request_id)
        try:
            return dialect.parse_generate(response, server.info)
        except (ServerError, ProtocolError) as exc:
            exc.add_note(f"server: {server.address}")
            raise

    async def _abort(self, lease: Lease, request_id: str) -> None:
        """Ask the server that owns a request to drop it.

        A closed connection alone is not trusted to do that. The lease is held meanwhile: until it
        is aborted the request takes one of the server's slots. The answer does not matter: the
        request may have ended, and a dead server has nothing to abort.
        """
        request = self.pool.dialect.abort(request_id, lease.server.info)
        with trio.CancelScope(
            deadline=trio.current_time() + self.config.abort_timeout_s, shield=True
        ):
            try:
                await self.pool.control(lease.server, request, self.config.abort_timeout_s)
            except RolloutError:
                return

    def _versions(self, lease: Lease, answer: SegmentResponse) -> tuple[Int32Array, bool]:
        """The version of each token of an answer, and whether they are known.

        The server's own spans win. Without them the version pinned when the lease was granted
        stands, exact unless an update landed on that server since.
        """
        count = len(answer.token_ids)
        if answer.versions is None:
            exact = lease.server.version == lease.version
            return np.full(count, lease.version, dtype=np.int32), exact
        versions = np.full(count, lease.version, dtype=np.int32)
        exact = True
        self._check_belief(lease, answer.versions)
        for span in answer.versions:
            if span.version is None:
                exact = False
                continue
            self._check_span(lease, span)
            versions[span.start : span.end] = span.version
        return versions, exact

    def _check_belief(self, lease: Lease, spans: Sequence[VersionSpan]) -> None:
        """Take a server out whose last tokens are of other weights than the pool believes it has.

        It restarted, or somebody else updates it. What else it is working on is lost as well. An
        update that lands while the answer is on its way moves the belief from the lease's version
        to what the server was told. One that takes no label says what it likes.
        """
        server = lease.server
        if not spans or not server.labelled:
            return
        bounds = (lease.version, server.version, server.told)
        if spans[-1].version not in range(min(bounds), max(bounds) + 1):
            words = f"it reports version {spans[-1].version}, not {server.version}"
            if server.state in IN_SERVICE:
                self.pool.mark_stale(server, words)
                self.pool.cut_off(server)
            raise ProtocolError(f"{server.address}: {words}; its tokens are dropped")

    def _check_span(self, lease: Lease, span: VersionSpan) -> None:
        version = span.version or 0
        if version > self.pool.newest_told:
            raise ProtocolError(
                f"{lease.server.address} reports tokens of version {version}, but no server was "
                f"told to load anything beyond {self.pool.newest_told}: does another trainer "
                "update it?"
            )

    def _check_interruptions(self, generation: _Generation) -> None:
        generation.interruptions += 1
        if generation.interruptions > self.config.max_interruptions:
            raise RolloutError(
                f"the generation was aborted {generation.interruptions} times by its servers; "
                f"max_interruptions is {self.config.max_interruptions}"
            )
        self._check_may_resume(generation, None)

    def _check_may_resume(self, generation: _Generation, cause: RolloutError | None) -> None:
        kept = state_kept_by_server(generation.request.gconfig)
        if generation.count and kept and not self.config.allow_inexact_resume:
            raise RolloutError(
                f"the generation was interrupted and uses {kept}, which a server keeps per "
                "request: going on elsewhere would not give what an undisturbed server gives. "
                "Pause with mode='keep', or set allow_inexact_resume=True"
            ) from cause


def state_kept_by_server(gconfig: GenerationHyperparameters) -> str:
    """The options whose effect depends on more than prompt + tokens so far; empty if none.

    ``repetition_penalty`` is not among them: it looks at prompt and output alike, so it sees the
    same tokens after a resume.
    """
    used = {
        "frequency_penalty": gconfig.frequency_penalty != 0,
        "presence_penalty": gconfig.presence_penalty != 0,
        "stop strings": bool(gconfig.stop),
    }
    return ", ".join(name for name, is_used in used.items() if is_used)


@dataclass(slots=True, eq=False)
class _Generation:
    """The state of one generation: what it has, what it may still ask for."""

    request: ModelRequest
    rid: str
    budget: int
    origin: Origin
    server: str | None = None
    wait_s: float = 0.0
    interruptions: int = 0
    failovers: int = 0
    failed_on: frozenset[str] = frozenset()  # the server that failed last
    stop_reason: StopReason = "abort"
    ended: bool = False
    exact: bool = True
    tokens: list[Int32Array] = field(default_factory=list)
    logprobs: list[Float32Array] = field(default_factory=list)
    versions: list[Int32Array] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    count: int = 0
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def finished(self) -> bool:
        return self.ended or self.count >= self.budget

    @property
    def under_way(self) -> bool:
        """Whether it ran before: then it waits for nobody that has not."""
        return bool(self.count or self.failovers or self.interruptions)

    @property
    def lowest_admissible_version(self) -> int:
        """Versions never go back within a generation (I8), nor below the permit's."""
        last = int(self.versions[-1][-1]) if self.count else PROMPT_VERSION
        return max(self.origin.version, last)

    def next_segment(self, config: RolloutConfig, lease: Lease) -> SegmentRequest:
        gconfig = self.request.gconfig
        number = next(self._numbers)
        tokens = self.request.input_ids
        if self.count:
            tokens = np.concatenate([tokens, *self.tokens])
        return SegmentRequest(
            request_id=f"{self.rid}-{number}",
            token_ids=tokens,
            max_new_tokens=min(self.budget - self.count, self._segment_limit(config)),
            min_new_tokens=max(0, min(gconfig.min_new_tokens, self.budget) - self.count),
            gconfig=gconfig,
            model=gconfig.lora_name or config.model or lease.server.info.model or "",
            seed=None if gconfig.seed is None else _seed_of_segment(gconfig.seed, number),
        )

    def _segment_limit(self, config: RolloutConfig) -> int:
        """``segment_tokens``, where a joint between segments changes nothing."""
        stateful = bool(state_kept_by_server(self.request.gconfig))
        if config.segment_tokens is None or (stateful and not config.allow_inexact_resume):
            return self.budget
        return config.segment_tokens

    def take(
        self,
        server: str,
        segment: SegmentRequest,
        answer: SegmentResponse,
        versions: Int32Array,
        exact: bool,
    ) -> None:
        """Append an answer; raise, changing nothing, where it breaks invariant I8."""
        count, asked = len(answer.token_ids), segment.max_new_tokens
        if len(answer.logprobs) != count or count > asked:
            raise ProtocolError(
                f"{server} answered {count} tokens and {len(answer.logprobs)} logprobs "
                f"where at most {asked} were asked for"
            )
        floor = self.lowest_admissible_version
        if count and (int(versions[0]) < floor or bool(np.any(np.diff(versions) < 0))):
            raise ProtocolError(f"{server} reports weight versions that go back, or below {floor}")
        self.stop_reason = answer.stop_reason
        self.server = server
        self.failed_on = frozenset()
        if count:
            self.tokens.append(answer.token_ids)
            self.logprobs.append(answer.logprobs)
            self.versions.append(versions)
            self.segments.append(Segment(server, self.count, self.count + count))
            self.exact = self.exact and exact
        self.count += count
        cut_by_us = answer.stop_reason == "length" and count == asked
        self.ended = answer.stop_reason != "abort" and not (cut_by_us and self.count < self.budget)

    def response(self, latency_s: float) -> ModelResponse:
        return ModelResponse(
            rid=self.rid,
            input_tokens=self.request.input_ids,
            output_tokens=_joined(self.tokens, np.int32),
            output_logprobs=_joined(self.logprobs, np.float32),
            output_versions=_joined(self.versions, np.int32),
            stop_reason="length" if self.stop_reason == "abort" else self.stop_reason,
            versions_exact=self.exact,
            segments=tuple(self.segments),
            latency_s=latency_s,
            wait_s=self.wait_s,
        )


def _joined(parts: Sequence[npt.NDArray[Scalar]], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _seed_of_segment(seed: int, number: int) -> int:
    """Another seed for each segment: the same one would repeat the first segment's draws."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] & 0x7FFFFFFF)


def make_dialect(backend: str) -> Dialect:
    """The dialect of a ``backend``.

    Raises:
        ConfigError: For a name that is none.
    """
    if backend == "vllm":
        return VllmDialect()
    if backend == "sglang":
        return SglangDialect()
    raise ConfigError(f"backend must be one of vllm, sglang, not {backend!r}")


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
        NoServerAvailable: If a server is not ready within ``setup_timeout_s``.
    """
    own = transport is None
    if transport is None:
        ensure_descriptors(_descriptors_needed(config))
        transport = HttpTransport()
    try:
        pool = ServerPool(config, dialect or make_dialect(config.backend), transport)
        with pool.open():
            await pool.join()
            async with background(supervise, pool):
                yield RemoteEngine(pool, config)
    finally:
        if own:
            with trio.CancelScope(shield=True):
                await transport.aclose()


def _descriptors_needed(config: RolloutConfig) -> int:
    rollouts = config.max_concurrent_rollouts or config.consumer_batch_size
    return rollouts + 4 * len(config.servers) + 64
