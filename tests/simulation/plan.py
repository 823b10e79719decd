"""Plan: one whole training run, drawn from a seed before anything of it happens.

Runs are small and many rather than large and few: with one to four servers of one to four slots,
and batches of one to five, every queue is full, every limit is met and every race is lost within a
hundred rollouts. What a plan leaves open (which answer is long, which fault meets which request) is
drawn while it is played, from the same seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from arealtrio import GenerationHyperparameters, GroupPolicy
from arealtrio.errors import DeadlineExceeded, RequestRejected, TooStale, WorkflowError
from arealtrio.testing import EOS, LogNormalLengths, SimulatedServerSettings
from arealtrio.testing.faults import ALL
from arealtrio.types import PauseMode

UpdateKind: TypeAlias = Literal["all at once", "rolling", "lora", "mixed"]
DialectName: TypeAlias = Literal["vllm", "sglang"]
CrashKind: TypeAlias = Literal["cancelled", "raises"]

TOKEN_TIME_S = 0.04
PAUSES: dict[DialectName, tuple[PauseMode, ...]] = {
    "vllm": ("keep", "keep", "abort", "wait"),
    "sglang": ("keep", "retract", "abort"),
}
LONGEST = 200  # tokens; the longest answer takes 8 s on a server of common speed
LORA = "policy"
NEVER_S = 2000.0  # longer than any rollout needs, and shorter than a run may last
ROLLOUTS = (30, 130)  # of one run, evaluation and repetitions not counted


@dataclass(frozen=True)
class Change:
    """Something that is done to the fleet from outside, at a moment of the run.

    Args:
        at_s: When, on the run's clock.
        what: ``add``, ``remove``, ``cap``, or the name of a fault.
        server: Which, by index.
        value: The cap, or how long a fault lasts in seconds.
    """

    at_s: float
    what: str
    server: int
    value: float = 0.0

    def __str__(self) -> str:
        return f"at {self.at_s:.2f} s: {self.what} server-{self.server} ({self.value:g})"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How often what goes wrong in user code does so, each a share of prompts or of attempts.

    Args:
        reject: Of prompts: the filter says no.
        none: Of attempts: the workflow returns None.
        fail: Of attempts: the workflow raises.
        hang: Of attempts: it never ends by itself.
        stay: Of attempts: it takes its time to leave when it is cancelled.
        twins: Of attempts: it asks for two answers at once.
        refused: Of prompts: every server refuses the request (4xx).
    """

    reject: float = 0.0
    none: float = 0.0
    fail: float = 0.0
    hang: float = 0.0
    stay: float = 0.0
    twins: float = 0.0
    refused: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed of a run. Times are in seconds.

    Args:
        seed: What it was drawn from.
        servers: All that there ever are.
        first: How many of them the run begins with.
        lengths: Of answers.
        config: For ``RolloutConfig``.
        gconfig: For each generation.
        prompts: Of one epoch.
        epochs: How many.
        read_at_once: Prompts that the loader gives at a time; 0: one, and not in a list.
        group_size: Members of a group.
        group_policy: What becomes of a group whose member does not succeed.
        dynamic: Whether a rejected group takes a place in the batch.
        turns: Generations of one rollout, one after the other, each with the last one's tokens.
        think_s: The longest time that a rollout spends on something else before a generation.
        reward_s: The longest time that its reward takes.
        training_s: Of one step.
        update: How weights reach the servers.
        pause: How requests in flight are held meanwhile.
        oddity: How often the trainer does something else than the next step.
        evaluations: Prompts in each evaluation that runs beside training; 0: none do.
        offline: Groups in each ``submit`` that is waited for beside training; 0: none are.
        shares: What goes wrong in user code.
        rates: Of faults by chance, by kind.
        outage_s: How long those last that last.
        horizon_s: When faults by chance end.
        changes: What is done to the fleet.
        crashes: When the trainer dies, and how; it starts again at once.
    """

    seed: int
    servers: tuple[SimulatedServerSettings, ...]
    first: int
    lengths: LogNormalLengths
    length_words: str
    config: dict[str, Any]
    gconfig: GenerationHyperparameters
    prompts: int
    epochs: int = 1
    read_at_once: int = 0
    group_size: int = 1
    group_policy: GroupPolicy | None = None
    dynamic: bool = False
    turns: int = 1
    think_s: float = 0.0
    reward_s: float = 0.0
    training_s: float = 1.0
    update: UpdateKind = "all at once"
    pause: PauseMode = "keep"
    oddity: float = 0.0
    evaluations: int = 0
    offline: int = 0
    shares: Shares = field(default_factory=Shares)
    rates: Mapping[str, float] = field(default_factory=dict)
    outage_s: tuple[float, float] = (1.0, 10.0)
    horizon_s: float = 40.0
    changes: tuple[Change, ...] = ()
    crashes: tuple[tuple[float, CrashKind], ...] = ()
    faulty: bool = False

    @property
    def dialect(self) -> DialectName:
        """What all servers speak."""
        return self.servers[0].dialect

    @property
    def bounded(self) -> bool:
        """Whether ``max_staleness`` is a guarantee under its straggler policy."""
        return bool(self.config["straggler_policy"] != "keep")

    @property
    def expected_errors(self) -> tuple[type[Exception], ...]:
        """What a rollout may fail with where no server fails."""
        expected: list[type[Exception]] = [TooStale, WorkflowError]
        if self.shares.refused:
            expected.append(RequestRejected)
        if self.config["rollout_timeout_s"] < NEVER_S:
            expected.append(DeadlineExceeded)
        return tuple(expected)

    def chance(self, what: str, prompt_id: object) -> float:
        """In [0, 1), the same for all members of a group, whatever the schedule."""
        return random.Random(f"{self.seed} {what} {prompt_id}").random()

    def __str__(self) -> str:
        lines = [
            f"servers   {len(self.servers)}, of which {self.first} at first",
            *(f"          {_server_words(s)}" for s in self.servers),
            f"answers   {self.length_words}; {_gconfig_words(self.gconfig)}",
            f"prompts   {self.epochs} x {self.prompts}, read {self.read_at_once or 1} at once",
            f"groups    of {self.group_size}, {_policy_words(self.group_policy)}"
            f"{', dynamic batches' if self.dynamic else ''}",
            f"rollouts  {self.turns} turns, think {self.think_s:g} s, reward {self.reward_s:g} s, "
            f"{_share_words(self.shares)}",
            f"trainer   {self.training_s:g} s a step, updates {self.update}, pause {self.pause}, "
            f"oddity {self.oddity:g}",
            f"beside    {self.evaluations} evaluations, {self.offline} offline groups",
            f"config    {', '.join(f'{k}={v}' for k, v in self.config.items())}",
            f"faults    {_rate_words(self)}",
            *(f"change    {change}" for change in self.changes),
            *(f"crash     at {at_s:.2f} s: {kind}" for at_s, kind in self.crashes),
        ]
        return "\n".join(lines)


def _server_words(settings: SimulatedServerSettings) -> str:
    return (
        f"{settings.dialect}, {settings.max_num_seqs} slots, speed {settings.speed:g}, growth "
        f"{settings.batch_growth:g}, latency {settings.latency_s:g} s, "
        f"load {settings.load_time_s:g} s"
    )


def _gconfig_words(gconfig: GenerationHyperparameters) -> str:
    words = [f"at most {gconfig.max_new_tokens} tokens"]
    if gconfig.min_new_tokens:
        words.append(f"at least {gconfig.min_new_tokens}")
    if gconfig.stop_token_ids:
        words.append(f"stop at {gconfig.stop_token_ids}")
    if gconfig.lora_name:
        words.append(f"adapter {gconfig.lora_name}")
    return ", ".join(words)


def _policy_words(policy: GroupPolicy | None) -> str:
    if policy is None:
        return "all members"
    return f"{policy.kind} (least {policy.least}, again {policy.max_again})"


def _rate_words(plan: Plan) -> str:
    rates = ", ".join(f"{kind} {rate:g}" for kind, rate in plan.rates.items())
    first, last = plan.outage_s
    return f"{rates}, for {first:g} to {last:g} s, until {plan.horizon_s:g} s" if rates else "none"


def _share_words(shares: Shares) -> str:
    used = {name: getattr(shares, name) for name in Shares.__dataclass_fields__}
    return ", ".join(f"{name} {share:g}" for name, share in used.items() if share) or "all go well"


# --- drawing -------------------------------------------------------------------------------------


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(f"plan {seed}")
    faulty = rng.random() < 0.65
    servers = _servers(rng, rng.choice(("vllm", "vllm", "sglang")))
    groups = _groups(rng)
    update = rng.choice(("all at once", "all at once", "rolling", "mixed", "lora"))
    horizon_s = rng.choice((20.0, 40.0, 150.0))
    shares = _shares(rng)
    hangs = shares.hang > 0
    return Plan(
        seed=seed,
        servers=servers,
        first=rng.randint(1, len(servers)),
        **_answers(rng, lora=update == "lora"),
        config=_config(rng, servers, faulty=faulty, hangs=hangs),
        **groups,
        turns=rng.choice((1, 1, 1, 2, 3)),
        think_s=rng.choice((0.0, 0.0, 0.5, 6.0)),
        reward_s=rng.choice((0.0, 0.0, 1.0)),
        training_s=rng.choice((0.2, 1.0, 3.0)),
        update=update,  # type: ignore[arg-type]
        pause=rng.choice(PAUSES[servers[0].dialect]),
        oddity=rng.choice((0.0, 0.1, 0.4)),
        evaluations=rng.choice((0, 0, 1, 4)),
        offline=rng.choice((0, 0, 0, 1, 3)),
        shares=shares,
        rates=_rates(rng) if faulty else {},
        outage_s=rng.choice(((0.1, 2.0), (1.0, 10.0), (5.0, 30.0))),
        horizon_s=horizon_s,
        changes=_changes(rng, len(servers), horizon_s, faulty=faulty),
        crashes=_crashes(rng, horizon_s),
        faulty=faulty,
    )


def _servers(rng: random.Random, dialect: DialectName) -> tuple[SimulatedServerSettings, ...]:
    latency_s, load_s = rng.choice((0.0, 0.01, 0.2)), rng.choice((0.0, 0.3, 2.0))
    growth = rng.choice((0.0, 0.1))
    return tuple(
        SimulatedServerSettings(
            max_num_seqs=rng.randint(1, 4),
            token_time_s=TOKEN_TIME_S,
            speed=rng.choice((0.5, 1.0, 1.0, 2.0)),
            batch_growth=growth,
            latency_s=latency_s,
            load_time_s=load_s,
            max_model_len=5000,
            dialect=dialect,
        )
        for _ in range(rng.choice((1, 2, 2, 3, 4)))
    )


def _groups(rng: random.Random) -> dict[str, Any]:
    size = rng.choice((1, 1, 2, 3, 4))
    epochs = rng.choice((1, 1, 2))
    policies: tuple[Callable[[], GroupPolicy | None], ...] = (
        lambda: None,
        lambda: GroupPolicy.all(max_retries=rng.randint(0, 2)),
        lambda: GroupPolicy.at_least(rng.randint(1, size)),
        lambda: GroupPolicy.replace(rng.randint(1, 3)),
    )
    return {
        "group_size": size,
        "epochs": epochs,
        "prompts": max(4, rng.randint(*ROLLOUTS) // (size * epochs)),
        "group_policy": rng.choice(policies)(),
        "dynamic": rng.random() < 0.2,
        "read_at_once": rng.choice((0, 0, 1, 5)),
    }


def _answers(rng: random.Random, *, lora: bool) -> dict[str, Any]:
    median, sigma = rng.choice((3, 12, 30)), rng.choice((0.0, 0.6, 1.2))
    return {
        "lengths": LogNormalLengths(median, sigma, LONGEST),
        "length_words": f"log-normal, median {median}, sigma {sigma:g}, at most {LONGEST}",
        "gconfig": GenerationHyperparameters(
            max_new_tokens=rng.choice((1000, 1000, 40, 7)),
            min_new_tokens=rng.choice((0, 0, 5)),  # within one segment: a script knows no more
            max_tokens=4000,
            stop_token_ids=rng.choice(((), (), (EOS + 2,))),
            lora_name=LORA if lora else "",
        ),
    }


def _config(
    rng: random.Random, servers: tuple[SimulatedServerSettings, ...], *, faulty: bool, hangs: bool
) -> dict[str, Any]:
    slots = sum(server.max_num_seqs for server in servers)
    return {
        "backend": servers[0].dialect,
        "vocab_size": EOS + 10 * LONGEST,
        "consumer_batch_size": rng.randint(1, 5),
        "max_staleness": rng.choice((0, 0, 1, 1, 2, 4)),
        "straggler_policy": rng.choice(("wait", "wait", "keep", "requeue", "drop")),
        "max_requeues": rng.randint(0, 2),
        "max_concurrent_rollouts": rng.choice((None, 1, rng.randint(2, 8), slots, slots + 3)),
        "schedule_policy": rng.choice(("least_request", "least_request", "round_robin")),
        "queue_order": rng.choice(("fifo", "deadline", "longest_expected")),
        "queue_overtakes_max": rng.choice((0, 3, 4096)),
        "queue_size": rng.choice((None, None, 1, 3, 20)),
        "priority": rng.choice(("eval", "train")),
        "max_requests_per_server": rng.choice((None, None, 1, 2)),
        "segment_tokens": rng.choice((None, None, 6, 25)),
        "streaming": rng.random() < 0.3,
        "affinity_size": rng.choice((0, 2, 65536)),
        "eject_after_failures": rng.randint(1, 3),
        "min_updated": 1,
        "seed": rng.randint(0, 1000),
        "rollout_timeout_s": rng.choice((60.0, 300.0)) if faulty or hangs else NEVER_S,
        "segment_timeout_s": 60.0 if faulty else NEVER_S,
        **LIMITS,
    }


# What is outside answers within these, or never will; none is near what a healthy server needs.
LIMITS: dict[str, Any] = {
    "first_byte_timeout_s": 30.0,
    "idle_timeout_s": 30.0,
    "control_timeout_s": 5.0,
    "update_timeout_s": 60.0,
    "health_timeout_s": 2.0,
    "health_interval_s": 4.0,
    "probe_interval_s": 0.5,
    "probe_interval_max_s": 4.0,
    "no_server_grace_s": 40.0,
    "setup_timeout_s": 30.0,
    "max_consecutive_failures": 1000,
    "stall_warning_s": 10_000.0,
    "slow_step_warning_s": None,
}


def _shares(rng: random.Random) -> Shares:
    def share(*values: float) -> float:
        return rng.choice((0.0, 0.0, *values))

    return Shares(
        reject=share(0.2, 0.5),
        none=share(0.1),
        fail=share(0.05, 0.2),
        hang=share(0.02) if rng.random() < 0.3 else 0.0,
        stay=share(0.1),
        twins=share(0.2),
        refused=share(0.1),
    )


def _rates(rng: random.Random) -> dict[str, float]:
    """Some kinds, now and then all; often enough to meet, and not so often that nothing else is."""
    factor, share = rng.choice((0.5, 2.0, 6.0)), rng.choice((0.15, 0.5, 1.0))
    chosen = [kind for kind in ALL if rng.random() < share]
    return {kind.value: min(0.3, ALL[kind] * factor) for kind in chosen}


MEMBERSHIP = ("add", "remove", "cap")
OUTAGES = ("die", "hang", "restart", "partition", "slow")


def _changes(
    rng: random.Random, servers: int, horizon_s: float, *, faulty: bool
) -> tuple[Change, ...]:
    changes = [
        Change(rng.uniform(0, horizon_s), rng.choice(MEMBERSHIP),
               rng.randrange(servers), rng.randint(0, 5))
        for _ in range(rng.choice((0, 0, 3, 8)))
    ]  # fmt: skip
    if faulty:
        changes += [
            Change(rng.uniform(0, horizon_s), rng.choice(OUTAGES), rng.randrange(servers),
                   rng.choice((0.1, 1.0, 5.0, 15.0)))
            for _ in range(rng.choice((0, 0, 2, 5)))
        ]  # fmt: skip
    return tuple(sorted(changes, key=lambda change: change.at_s))


def _crashes(rng: random.Random, horizon_s: float) -> tuple[tuple[float, CrashKind], ...]:
    count = rng.choice((0, 0, 0, 1, 2))
    kinds: tuple[CrashKind, ...] = ("cancelled", "raises")
    moments = sorted(rng.uniform(0.5, horizon_s) for _ in range(count))
    return tuple((at_s, rng.choice(kinds)) for at_s in moments)
