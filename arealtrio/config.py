"""RolloutConfig: every limit by name, with its unit, its default, and how to choose it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from .checks import finite, flag, integer, one_of, shown, text
from .errors import ConfigError
from .types import TimeLimits

Backend: TypeAlias = Literal["vllm", "sglang", "vllm_areal"]
SchedulePolicyName: TypeAlias = Literal["least_request", "round_robin"]
QueueOrder: TypeAlias = Literal["fifo", "deadline", "longest_expected"]
StragglerPolicy: TypeAlias = Literal["wait", "keep", "requeue", "drop"]
Priority: TypeAlias = Literal["eval", "train"]

BACKENDS = ("vllm", "sglang", "vllm_areal")
SCHEDULE_POLICIES = ("least_request", "round_robin")
QUEUE_ORDERS = ("fifo", "deadline", "longest_expected")
STRAGGLER_POLICIES = ("wait", "keep", "requeue", "drop")
PRIORITIES = ("eval", "train")

CONCURRENCY_MAX = 2**23 - 1  # what the counters of admission hold
BUDGET_MAX = 2**38  # half of what they hold of groups: it moves up with every version
CAP_MAX = 2**20  # what the heap of servers holds
# More answers to one prompt than the largest studies of repeated sampling take (10,000). A group is
# taken whole: at this size ``submit`` keeps the event loop for 0.4 s, and at four times it for 5 s.
GROUP_SIZE_MAX = 2**14
COUNT_MAX = 2**48  # anything else: more is a mistake
SECRET_SIZE = 8  # characters; a shorter word of a header is no key, and stands in other text too


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """What a rollout run is allowed to do. Checked whole at construction.

    Args:
        servers: Base URLs of the inference servers, ``http://host:port``; no two alike.
        backend: Their dialect: ``vllm``, ``sglang``, or ``vllm_areal`` for vLLM servers that AReaL
            started, which have routes of their own for pausing and for weights.
        consumer_batch_size: Groups in one training batch (B). A prompt without ``group_size`` is a
            group of one.
        max_staleness: Weight versions that a consumed token may be behind (AReaL's
            ``max_head_offpolicyness``). 0 is synchronous; AReaL used 4 for code and 8 for
            mathematics. Higher hides longer answers behind training, and trains on older ones.
        max_concurrent_rollouts: Rollouts (members of groups) in flight at most. None:
            ``consumer_batch_size`` groups' worth of the largest training group so far; evaluation
            may fill as many slots with its own.
            Choose the sum of the servers' caps, or a little above it while rewards take time.
        schedule_policy: ``least_request`` sends to the server with the least outstanding ÷ cap;
            ``round_robin`` takes strict turns, which leaves servers idle behind long answers.
        max_requests_per_server: Requests in flight on one server (its cap). One number, or one by
            address; None asks the server (vLLM ``max_num_seqs``, SGLang ``max_running_requests``),
            else 256. Never set it below what the server can run: that costs its full shortfall.
        queue_order: In what order requests that wait get the slots that come free. ``fifo``
            (default); ``deadline``, the oldest admissible version first; ``longest_expected``, by
            what earlier answers to the same prompt say, so that a batch does not end with one long
            answer on idle servers. The last pays where many requests are queued at once, as in
            synchronous training or evaluation, and learns across epochs where prompts carry a
            ``prompt_id``.
        queue_overtakes_max: Younger requests that may be served before a waiting one, where the
            order is not ``fifo``; then it goes first. Choose it above the requests of one batch,
            or the order ends with it.
        straggler_policy: What happens when a long rollout would be overtaken. ``wait`` (default):
            batches leave in permit order, and no consumed token is ever older than
            ``max_staleness``. ``keep``: AReaL's behaviour; younger ones overtake, and violations
            are counted. ``requeue`` and ``drop``: younger ones overtake, and what can no longer be
            in time is cancelled, and its prompt queued again or not: the bound holds and nobody
            waits, but long answers are under-sampled, which biases what is learnt towards short
            ones.
        max_requeues: Times that one prompt is queued again under ``requeue``; then it is dropped.
        priority: Which of evaluation and training starts first where both could. A trainer that
            evaluates waits for it, so ``eval`` is the default; ``train`` fits an evaluation that
            nobody waits for.
        queue_size: Prompts taken from the caller and not yet started, in groups. None: twice
            ``(max_staleness + 1) * consumer_batch_size``, so that a whole window can be queued.
        seed: Of the order within a batch.
        model: Name to put into requests; None asks the server.
        vocab_size: Token ids must be below it; None asks the server, and checks nothing where it
            does not say.
        headers: Sent with every request (authentication); never logged. Where a server's refusal
            repeats a key of them, the error does not.
        server_headers: Further headers by server, which win over ``headers``; never logged. Servers
            that are added later may be named too.
        ca_file: Certificate authorities, in PEM, that https servers are checked against; None takes
            the system's. For more (client certificates, another authority for each server), pass
            ``open_engine`` an ``HttpTransport(ssl_context=…, server_ssl_contexts=…)``.
        max_consecutive_failures: Groups that may fail in a row before ``prepare_batch`` ends with
            TooManyFailures. A group counts once, as it settles; one that its policy saved does not.
            Choose it above the prompts in flight that one dead server can fail.
            ``wait`` and ``rollout_batch`` return each failure to their caller instead.
        max_failure_ratio: Share of failures among the last ``failure_window`` groups above which
            ``prepare_batch`` ends with TooManyFailures. 1 is never.
        failure_window: Groups looked at for it; with fewer settled it is not asked.
        max_consecutive_rejections: Groups that may be rejected with none accepted between, before
            ``prepare_batch`` ends with TooManyFailures: a filter that accepts nothing would
            keep it for ever. Choose it far above what a strict filter needs for one group; None is
            never.
        max_interruptions: How often one generation may be aborted by its server and sent again.
        allow_inexact_resume: Let a generation go on after an interruption also where the result may
            differ from an undisturbed one: under frequency or presence penalties, whose counts a
            server keeps per request, and with stop strings, which may lie across the joint.
        rollout_timeout_s: Deadline of one rollout, from its start to its settlement.
        segment_timeout_s: Deadline of one generation request.
        first_byte_timeout_s: Of a streamed one, from the request to its first token. It covers the
            server's own queue and prefill.
        idle_timeout_s: Of a streamed one, between two tokens. A paused server sends nothing, so
            choose it above your longest weight update; what it finds sooner than
            ``segment_timeout_s`` is a server that hangs and keeps its connections.
        connect_timeout_s: Name resolution, TCP and TLS.
        control_timeout_s: One request that pauses or resumes a server.
        update_timeout_s: One request that loads weights.
        abort_timeout_s: One request that aborts another; nothing waits longer for it, and for half
            a second at most once the run closes.
        health_timeout_s: One health check. SGLang's takes a second when idle.
        health_interval_s: Between two health checks of a serving server, which tell as well
            whether it was restarted.
        eject_after_failures: Requests and health checks in a row that eject a server. One that
            refuses connections is ejected however many are left; on any other sign, never the last
            half of the fleet.
        probe_interval_s: Until an ejected or stale server is looked at; doubled each time.
        probe_interval_max_s: Where the doubling ends.
        no_server_grace_s: With no server in service for so long, requests that wait end with
            NoServerAvailable. Choose it above the time a server takes to restart.
        max_failovers: How often one generation may go on after a server failed it.
        failover_interval_s: Before it goes on for the second time in a row; doubled each time, up
            to ``probe_interval_max_s``. The first time it goes on at once. The two together say how
            long a storm of 5xx from every server is outlived: a minute with the defaults.
        segment_tokens: Ask for at most so many tokens at a time, so that a server that dies costs
            no more. Each segment costs one round trip, and prefill of what the prefix cache lost.
            None asks for all at once. Not used where going on would not be exact; see
            ``allow_inexact_resume``.
        streaming: Take tokens as they are made, so that a server that dies costs none of those that
            came. It costs an event for each token: 400 bytes instead of 150, and this process some
            13 µs instead of 0.1: a core is full at some 75,000 tokens a second over all servers.
            SGLang has to run with ``--incremental-streaming-output``; one that does not is asked
            for whole answers, because each of its events repeats all tokens, n² bytes for n.
            ``segment_tokens`` bounds the loss without that cost.
        affinity_size: Sessions remembered with the server that holds their prefix, the least
            recently used forgotten first; 0 is no affinity. Choose it above the sessions in flight.
        adaptive_caps: Lower a server's cap while it reports preemptions or a full key-value cache,
            and raise it again after, so that what it can not hold goes to servers that can. It pays
            where these are unequal or unequally loaded, and costs a lone server throughput.
        pressure_interval_s: Between two looks at a server's metrics for it. Choose some tens of
            decode steps.
        setup_timeout_s: Until all servers answer at the start.
        close_timeout_s: Until rollouts that have not left when the executor closes are named in a
            warning. They are waited for all the same: a task can not be ended from outside.
        stall_warning_s: With rollouts unsettled and none settled for so long, a table of what each
            does is logged. Choose it above your longest answer.
        slow_step_warning_s: User code that keeps the event loop for longer is named in a warning.
            None: it is not, and no step is timed.
        response_size_bytes: Answers above this are refused.
        ledger_path: File that keeps what ``prepare_batch`` took, finished and delivered, so that a
            run that was killed loses none of it and trains nothing twice. None keeps none. On a
            disk of this machine, one file for each run; see ``docs/ledger.md``.
        ledger_flush_s: Between two commits to it: what a crash costs at most, besides what was not
            finished. A commit costs one ``fsync``, in a thread.
        ledger_checkpoints: Newest ``state_dict`` s that can still be loaded; what came before them
            is trimmed. Choose one more than the checkpoints you would go back to, for the newest
            may not be on the disk yet.
        min_updated: Servers that must take a weight update for the version to advance; the others
            are out of service until an update reaches them.
    """

    servers: Sequence[str] = ()
    backend: Backend = "vllm"
    consumer_batch_size: int = 1
    max_staleness: int = 0
    max_concurrent_rollouts: int | None = None
    schedule_policy: SchedulePolicyName = "least_request"
    max_requests_per_server: int | Mapping[str, int] | None = None
    queue_order: QueueOrder = "fifo"
    queue_overtakes_max: int = 4096
    straggler_policy: StragglerPolicy = "wait"
    max_requeues: int = 2
    priority: Priority = "eval"
    queue_size: int | None = None
    seed: int = 0
    model: str | None = None
    vocab_size: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    server_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    ca_file: str | None = None
    max_consecutive_failures: int = 64
    max_failure_ratio: float = 1.0
    failure_window: int = 256
    max_consecutive_rejections: int | None = 10_000
    max_interruptions: int = 1000
    allow_inexact_resume: bool = False
    rollout_timeout_s: float = 7200.0
    segment_timeout_s: float = 3600.0
    first_byte_timeout_s: float = 900.0
    idle_timeout_s: float = 900.0
    connect_timeout_s: float = 10.0
    control_timeout_s: float = 60.0
    update_timeout_s: float = 600.0
    abort_timeout_s: float = 2.0
    health_timeout_s: float = 10.0
    health_interval_s: float = 10.0
    eject_after_failures: int = 3
    probe_interval_s: float = 1.0
    probe_interval_max_s: float = 60.0
    no_server_grace_s: float = 300.0
    max_failovers: int = 8
    failover_interval_s: float = 0.5
    segment_tokens: int | None = None
    streaming: bool = False
    affinity_size: int = 65536
    adaptive_caps: bool = False
    pressure_interval_s: float = 2.0
    setup_timeout_s: float = 300.0
    close_timeout_s: float = 10.0
    stall_warning_s: float = 300.0
    slow_step_warning_s: float | None = 0.05
    response_size_bytes: int = 256 * 2**20
    ledger_path: str | None = None
    ledger_flush_s: float = 1.0
    ledger_checkpoints: int = 2
    min_updated: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.servers, str) or not isinstance(self.servers, Iterable):
            raise ConfigError(f"servers must be a list of URLs, not {shown(self.servers)}")
        object.__setattr__(self, "servers", tuple(normalise_address(s) for s in self.servers))
        self._check_servers()
        one_of("backend", self.backend, BACKENDS)
        one_of("schedule_policy", self.schedule_policy, SCHEDULE_POLICIES)
        one_of("queue_order", self.queue_order, QUEUE_ORDERS)
        one_of("straggler_policy", self.straggler_policy, STRAGGLER_POLICIES)
        one_of("priority", self.priority, PRIORITIES)
        self._check_counts()
        self._check_caps()
        self._check_headers()
        self._check_rest()
        for name in (f.name for f in fields(self) if f.name.endswith("_s")):
            given = getattr(self, name)
            if given is None and name in _OPTIONAL_SECONDS:
                continue
            value = finite(name, given)
            if value <= 0:
                raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
            object.__setattr__(self, name, value)

    def _check_rest(self) -> None:
        for name in ("allow_inexact_resume", "streaming", "adaptive_caps"):
            flag(name, getattr(self, name))
        ratio = finite("max_failure_ratio", self.max_failure_ratio)
        if not 0 <= ratio <= 1:
            raise ConfigError(f"max_failure_ratio must be between 0 and 1, not {ratio!r}")
        object.__setattr__(self, "max_failure_ratio", ratio)
        if self.model is not None:
            text("model", self.model)
        ca_file = self.ca_file
        if ca_file is not None and not (isinstance(ca_file, str) and os.path.isfile(ca_file)):
            raise ConfigError(f"ca_file {shown(ca_file)} is no file that can be read here")
        self._check_ledger_path()

    def _check_ledger_path(self) -> None:
        if isinstance(self.ledger_path, os.PathLike):
            object.__setattr__(self, "ledger_path", os.fspath(self.ledger_path))
        path = self.ledger_path
        if path is not None and not (isinstance(path, str) and path and "\0" not in path):
            raise ConfigError(f"ledger_path must be a path or None, not {shown(path)}")

    def _check_servers(self) -> None:
        twice = sorted({s for s in self.servers if list(self.servers).count(s) > 1})
        if twice:
            raise ConfigError(f"servers are named twice: {', '.join(twice)}; name each once")

    def _check_counts(self) -> None:
        for name, least in (
            ("consumer_batch_size", 1),
            ("max_staleness", 0),
            ("max_concurrent_rollouts", 1),
            ("queue_size", 1),
            ("queue_overtakes_max", 0),
            ("vocab_size", 1),
            ("max_consecutive_failures", 1),
            ("failure_window", 1),
            ("max_consecutive_rejections", 1),
            ("max_requeues", 0),
            ("max_interruptions", 0),
            ("response_size_bytes", 1024),
            ("min_updated", 1),
            ("eject_after_failures", 1),
            ("max_failovers", 0),
            ("segment_tokens", 1),
            ("affinity_size", 0),
            ("ledger_checkpoints", 1),
        ):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_COUNTS:
                continue
            most = _LARGEST.get(name, COUNT_MAX)
            object.__setattr__(self, name, integer(name, value, least, most))
        object.__setattr__(self, "seed", integer("seed", self.seed, 0))
        if (self.max_staleness + 1) * self.consumer_batch_size > BUDGET_MAX:
            raise ConfigError(
                f"(max_staleness + 1) * consumer_batch_size must be at most {BUDGET_MAX}: "
                f"max_staleness is {self.max_staleness}, consumer_batch_size "
                f"{self.consumer_batch_size}"
            )
        if self.servers and self.min_updated > len(self.servers):
            raise ConfigError(
                f"min_updated is {self.min_updated}, but there are only {len(self.servers)} servers"
            )

    def _check_caps(self) -> None:
        caps = self.max_requests_per_server
        if isinstance(caps, Mapping):
            named = {normalise_address(s): _cap(cap) for s, cap in caps.items()}
            unknown = sorted(set(named) - set(self.servers))
            if unknown:
                raise ConfigError(
                    f"max_requests_per_server names servers that are not in servers: "
                    f"{', '.join(unknown)}"
                )
            object.__setattr__(self, "max_requests_per_server", named)
        else:
            object.__setattr__(self, "max_requests_per_server", _cap(caps))

    def _check_headers(self) -> None:
        """Names and values alone are checked here, and never repeated: they hold secrets."""
        if not isinstance(self.server_headers, Mapping):
            raise ConfigError("server_headers must be a mapping from servers to their headers")
        if not all(isinstance(h, Mapping) for h in (self.headers, *self.server_headers.values())):
            raise ConfigError("headers are a mapping from names to values")
        named = {normalise_address(s): dict(h) for s, h in self.server_headers.items()}
        object.__setattr__(self, "server_headers", named)
        object.__setattr__(self, "headers", dict(self.headers))
        for headers in (self.headers, *named.values()):
            if not all(_is_header(name, value) for name, value in headers.items()):
                raise ConfigError(
                    "one of headers or server_headers is not a name and a value, both of them "
                    "text that HTTP can send"
                )
            if _FRAMING & {name.lower() for name in headers}:
                raise ConfigError("headers do not say how long a body is; the transport does")

    def headers_of(self, server: str) -> tuple[tuple[str, str], ...]:
        """The headers of every request to a server; its own win, whatever the case of the names."""
        own = self.server_headers.get(server)
        if not own:  # nearly always
            return tuple(self.headers.items())
        lower = {name.lower() for name in own}
        shared = (
            (name, value) for name, value in self.headers.items() if name.lower() not in lower
        )
        return (*shared, *own.items())

    def secrets_of(self, server: str) -> tuple[str, ...]:
        """Words of these headers that may be keys, none before one that it is a part of.

        And the parts of words: a cookie, or ``Token token="…"``, names its key.
        """
        values = [value for _, value in self.headers_of(server)]
        if not values:  # nearly always
            return ()
        words = {word for value in values for word in (*value.split(), *_PARTS(value))}
        return tuple(sorted((w for w in words if len(w) >= SECRET_SIZE), key=len, reverse=True))

    def cap_of(self, server: str) -> int | None:
        """The cap configured for a server; None where the server is to be asked."""
        caps = self.max_requests_per_server
        return caps.get(server) if isinstance(caps, Mapping) else caps

    @property
    def pending_limit(self) -> int:
        """Groups that may be queued ahead of admission."""
        if self.queue_size is not None:
            return self.queue_size
        return 2 * (self.max_staleness + 1) * self.consumer_batch_size

    def segment_limits(self, *, streamed: bool = False) -> TimeLimits:
        """The limits of a generation request; not streamed, its answer comes all at the end."""
        whole_s = self.segment_timeout_s
        if not streamed:
            return TimeLimits.of(whole_s, connect_s=self.connect_timeout_s)
        return TimeLimits(
            connect_s=min(self.connect_timeout_s, whole_s),
            first_byte_s=min(self.first_byte_timeout_s, whole_s),
            idle_s=min(self.idle_timeout_s, whole_s),
            total_s=whole_s,
        )

    def control_limits(self, total_s: float) -> TimeLimits:
        """The limits of a control request of at most ``total_s`` seconds."""
        return TimeLimits.of(total_s, connect_s=self.connect_timeout_s)


_OPTIONAL_COUNTS = {
    "max_concurrent_rollouts",
    "max_consecutive_rejections",
    "queue_size",
    "segment_tokens",
    "vocab_size",
}
_OPTIONAL_SECONDS = {"slow_step_warning_s"}
_LARGEST = {
    "max_concurrent_rollouts": CONCURRENCY_MAX,
    "consumer_batch_size": CONCURRENCY_MAX,  # which it is, where no other limit is given
}


def _cap(cap: object) -> int | None:
    return None if cap is None else integer("max_requests_per_server", cap, 1, CAP_MAX)


_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"[\x21-\x7e]+")  # all else is escaped in a URL
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, 5.5, as Latin-1
_PARTS = re.compile(r"[^\s,;=\"']+").findall
_FRAMING = {"content-length", "transfer-encoding"}


def normalise_address(server: str) -> str:
    """Return one name for a server: no trailing slash, and no port where it is the scheme's own.

    Raises:
        ConfigError: If it is not an http(s) URL with a host, holds what a URL has to escape, or
            carries a query or a fragment.
    """
    if not isinstance(server, str):
        raise ConfigError(f"a server is a URL such as http://10.0.0.1:8000, not {shown(server)}")
    refusal = f"{shown(server)} is not a server's URL; write http://host:port"
    try:
        parts = urlsplit(server.strip())
        port = parts.port
    except ValueError:  # not chained: it repeats what it was given
        raise ConfigError(refusal) from None
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(
            "a server's URL has no query, fragment or credentials; put credentials into headers"
        )
    fits = parts.scheme in _DEFAULT_PORTS and parts.hostname and port != 0
    if not fits or not _URL.fullmatch(server.strip()):
        raise ConfigError(refusal)
    assert parts.hostname is not None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{host}:{port}"
    return f"{parts.scheme}://{authority}{parts.path.rstrip('/')}"


def _is_header(name: object, value: object) -> bool:
    if not (isinstance(name, str) and isinstance(value, str)):
        return False
    return bool(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value))
