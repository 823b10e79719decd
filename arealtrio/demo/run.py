"""The demo: asynchronous reinforcement learning from end to end, on one machine, in seconds.

Everything in it is real and small: servers in processes of their own, rollouts over HTTP, a trainer
that learns, and weights that reach every server while rollouts go on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import trio

from ..checks import flag, integer, one_of, shown
from ..config import SCHEDULE_POLICIES, RolloutConfig, SchedulePolicyName
from ..controller import RolloutController
from ..errors import ConfigError
from ..transport import HttpTransport
from ..types import HttpRequest, TimeLimits
from ..weights import WeightUpdate
from ..wire import metrics
from .fleet import ServerProcess, server_processes
from .report import DemoReport, Tally, progress_line
from .task import BudgetWorkflow, Prompts, base_model
from .trainer import PolicyTrainer

SLOTS_PER_SERVER = 16
TOKEN_TIME_S = 0.002  # so that generation, not the trainer, is what takes time
DRAIN_TIMEOUT_S = 30.0
METRICS_TIMEOUT_S = 5.0
_REQUESTS_METRIC = "arealtrio_embedded:requests_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to run.

    Args:
        steps: Training steps, at least 1.
        servers: Embedded servers, each a process.
        max_staleness: Versions that a trained token may be behind.
        schedule_policy: ``least_request`` or ``round_robin``.
        batch_size: Prompts in a training batch.
        group_size: Answers to each of them.
        seed: Of the base model, the prompts and the trainer. Runs of one seed still differ: which
            version makes which token is a matter of timing.
        keep_weights: Where to leave the weights of every version; None throws them away.
        freeze_weights: Withhold the trainer's updates: every version is the base model again. All
            else is equal, so what is learnt without this is learnt through the weights.

    Raises:
        ConfigError: A value is of another type or out of its range.
    """

    steps: int = 20
    servers: int = 4
    max_staleness: int = 4
    schedule_policy: SchedulePolicyName = "least_request"
    batch_size: int = 16
    group_size: int = 4
    seed: int = 0
    keep_weights: Path | None = None
    freeze_weights: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("servers", 1),
            ("batch_size", 1),
            ("group_size", 1),
            ("max_staleness", 0),
            ("seed", 0),
        ):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        one_of("schedule_policy", self.schedule_policy, SCHEDULE_POLICIES)
        flag("freeze_weights", self.freeze_weights)
        if self.keep_weights is not None and not isinstance(self.keep_weights, Path):
            raise ConfigError(f"keep_weights must be a Path, not {shown(self.keep_weights)}")


def run_demo(options: DemoOptions, out: TextIO) -> DemoReport:
    """Run it, write a line a step to ``out``, and return what happened.

    However it ends, by Ctrl-C among others, it leaves no process and no temporary file.

    Args:
        options: What to run.
        out: For progress and summary, in plain lines of at most 80 columns.

    Raises:
        ArealTrioError: A server did not start, died, or did not take the weights.
        OSError: Weights cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="arealtrio-demo-") as scratch, _weights(options) as at:
        trainer = PolicyTrainer(base_model(options.seed), seed=options.seed)
        trainer.model.save(at / "v0")
        out.write(f"starting {options.servers} server{'s' * (options.servers > 1)}\n")
        out.flush()
        flags = _server_flags(options)
        with server_processes(options.servers, at / "v0", Path(scratch), flags) as processes:
            config = _config(options, [process.url for process in processes])
            with RolloutController(config) as rollout:
                report = _train(options, rollout, trainer, processes, at, out)
    out.writelines(f"{line}\n" for line in report.lines())
    return report


@contextmanager
def _weights(options: DemoOptions) -> Iterator[Path]:
    if options.keep_weights is not None:
        yield options.keep_weights.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="arealtrio-weights-") as directory:
        yield Path(directory)


def _server_flags(options: DemoOptions) -> list[str]:
    flags = {
        "max-num-seqs": SLOTS_PER_SERVER,
        "token-time-s": TOKEN_TIME_S,
        "seed": options.seed,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _config(options: DemoOptions, urls: Sequence[str]) -> RolloutConfig:
    return RolloutConfig(
        backend="vllm",
        servers=urls,
        schedule_policy=options.schedule_policy,
        max_concurrent_rollouts=SLOTS_PER_SERVER * options.servers,
        consumer_batch_size=options.batch_size,
        max_staleness=options.max_staleness,
        seed=options.seed,
        # The servers, and the trainer's numpy, compete for this machine: a short wait says nothing.
        slow_step_warning_s=5.0,
        min_updated=options.servers,  # a lost server ends the demo: nothing here would replace it
    )


def _train(
    options: DemoOptions,
    rollout: RolloutController,
    trainer: PolicyTrainer,
    processes: Sequence[ServerProcess],
    weights: Path,
    out: TextIO,
) -> DemoReport:
    prompts, workflow, tally = Prompts(options.seed), BudgetWorkflow(), Tally()
    base = trainer.model
    started = time.monotonic()
    for number in range(1, options.steps + 1):
        batch = rollout.prepare_batch(prompts, workflow, group_size=options.group_size)
        step = trainer.step(batch.padded())  # rollouts go on meanwhile
        path = weights / f"v{number}"
        (base if options.freeze_weights else trainer.model).save(path)
        for process in processes:
            process.check_alive()
        rollout.update_weights(WeightUpdate.from_disk(path, version=number))
        tally.add(batch, step)
        seconds = time.monotonic() - started
        out.write(progress_line(number, options.steps, batch, step, seconds) + "\n")
        out.flush()
    requests = _settled_requests(rollout)
    return tally.report(
        rollouts=rollout.rollout_counts(),
        seconds=seconds,
        weight_updates=options.steps,
        servers=_compared(requests, trio.run(_requests_reported, list(requests))),
    )


def _settled_requests(rollout: RolloutController) -> dict[str, int]:
    """Return each server's requests once none is under way, so that both sides count the same."""
    rollout.pause()
    rollout.drain(DRAIN_TIMEOUT_S)
    return {server.address: server.requests for server in rollout.statistics()}


def _compared(
    requests: Mapping[str, int], reported: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    return {
        address: {"requests": count, "requests_reported": reported[address]}
        for address, count in requests.items()
    }


async def _requests_reported(addresses: Sequence[str]) -> dict[str, int]:
    """Ask each server how many generation requests it has received."""
    async with HttpTransport() as transport:
        limits, ask = TimeLimits.of(METRICS_TIMEOUT_S), HttpRequest("GET", "/metrics")
        pages = {url: await transport.request(url, ask, limits) for url in addresses}
    wanted = {_REQUESTS_METRIC: True}
    read = {url: metrics.read_samples(page, "the server", wanted) for url, page in pages.items()}
    return {url: int(sum(samples[_REQUESTS_METRIC])) for url, samples in read.items()}
