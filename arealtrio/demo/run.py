"""The demo: asynchronous reinforcement learning from end to end, on one machine, in seconds.

Everything in it is real and small: servers in processes of their own, rollouts over HTTP, a trainer
that learns, and weights that reach every server while rollouts go on. With a state directory it is
also a trainer that can be killed: what it keeps, and in what order, is what a real one would keep.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from ..config import RolloutConfig
from ..controller import RolloutController
from ..errors import NoServerAvailable, WeightUpdateError
from .checkpoint import Checkpoint, StateDirectory
from .counts import compared, requests_reported
from .fleet import ServerProcess, server_processes
from .options import DemoOptions
from .report import DemoReport
from .training import Training, report_in

__all__ = ["DemoOptions", "run_demo"]

SLOTS_PER_SERVER = 16
TOKEN_TIME_S = 0.002  # so that generation, not the trainer, is what takes time
LEDGER_FLUSH_S = 0.05  # the default is for a run of hours, this one takes seconds
DRAIN_TIMEOUT_S = 30.0


def run_demo(options: DemoOptions, out: TextIO) -> DemoReport:
    """Run it, write a line a step to ``out``, and return what happened.

    However it ends, by Ctrl-C among others, it leaves no process that it started, and no file but
    what ``state`` and ``keep_weights`` ask for. With ``state`` it may be killed at any moment: the
    next call trains what is left, and no prompt twice.

    Args:
        options: What to run.
        out: For progress and summary, in plain lines of at most 80 columns.

    Raises:
        ConfigError: The directory ``state`` holds another run, or something else.
        ArealTrioError: A server did not start, died, or did not take the weights.
        OSError: Weights or state cannot be written.
    """
    with ExitStack() as stack:
        state = None
        saved = Checkpoint(options=options.of_the_run())
        if options.state is not None:
            state = StateDirectory(options.state.resolve())
            saved = stack.enter_context(state.opened(options.of_the_run()))
        report = report_in(saved)
        if report is None:
            report = _run(options, state, saved, out)
        else:
            out.write("this run has finished; to begin anew, choose another directory\n")
    out.writelines(f"{line}\n" for line in report.lines())
    out.flush()  # an error of a pipe is one of this run, not of the interpreter's end
    return report


def _run(
    options: DemoOptions, state: StateDirectory | None, saved: Checkpoint, out: TextIO
) -> DemoReport:
    with _places(options, state) as (weights, logs):
        training = Training(options, saved, state, weights, out)
        first = training.save_weights()
        with _servers(options, first, logs, out) as (urls, processes):
            config = _config(options, urls, state)
            before = requests_reported(config.servers)
            with RolloutController(config) as rollout:
                with _hint(options, first):
                    training.take_up(rollout)
                training.train(rollout, lambda: _check_alive(processes))
                requests = _settled_requests(rollout)
                counts = rollout.rollout_counts()
            servers = compared(requests, before, requests_reported(config.servers))
        return training.finish(counts, servers)


@contextmanager
def _places(options: DemoOptions, state: StateDirectory | None) -> Iterator[tuple[Path, Path]]:
    """Make the directories of the weights and of the servers' logs."""
    with ExitStack() as stack:

        def temporary(of: str) -> Path:
            made = tempfile.TemporaryDirectory(prefix=f"arealtrio-{of}-")
            return Path(stack.enter_context(made))

        weights = options.keep_weights or (state.weights if state else temporary("weights"))
        logs = state.logs if state else temporary("demo")
        logs.mkdir(exist_ok=True)
        yield weights.resolve(), logs


@contextmanager
def _servers(
    options: DemoOptions, weights: Path, logs: Path, out: TextIO
) -> Iterator[tuple[Sequence[str], Sequence[ServerProcess]]]:
    """Yield the servers' addresses, and the processes of those that are this demo's."""
    if options.server_urls:
        yield options.server_urls, ()
        return
    out.write(f"starting {options.servers} server{'s' * (options.servers > 1)}\n")
    out.flush()
    flags = _server_flags(options)
    with server_processes(options.servers, weights, logs, flags) as processes:
        yield [process.url for process in processes], processes


@contextmanager
def _hint(options: DemoOptions, weights: Path) -> Iterator[None]:
    """Say of somebody else's servers how they are to be started, where they take no weights."""
    try:
        yield
    except WeightUpdateError as exc:
        if not options.server_urls:
            raise
        kept = options.state is not None or options.keep_weights is not None
        where = weights if kept else "DIR/v0, where DIR is what --keep-weights left"
        raise NoServerAvailable(
            f"{exc}. A server for the demo is started with its model: arealtrio serve --weights "
            f"{where}"
        ) from exc


def _check_alive(processes: Sequence[ServerProcess]) -> None:
    for process in processes:
        process.check_alive()


def _server_flags(options: DemoOptions) -> list[str]:
    flags = {
        "max-num-seqs": SLOTS_PER_SERVER,
        "token-time-s": TOKEN_TIME_S,
        "seed": options.seed,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _config(
    options: DemoOptions, urls: Sequence[str], state: StateDirectory | None
) -> RolloutConfig:
    return RolloutConfig(
        backend="vllm",
        servers=urls,
        schedule_policy=options.schedule_policy,
        max_concurrent_rollouts=SLOTS_PER_SERVER * len(urls),
        consumer_batch_size=options.batch_size,
        max_staleness=options.max_staleness,
        seed=options.seed,
        # The servers, and the trainer's numpy, compete for this machine: a short wait says nothing.
        slow_step_warning_s=5.0,
        min_updated=len(urls),  # a lost server ends the demo: nothing here would replace it
        ledger_path=None if state is None else str(state.ledger),
        ledger_flush_s=LEDGER_FLUSH_S,
    )


def _settled_requests(rollout: RolloutController) -> dict[str, int]:
    """Return each server's requests once none is under way, so that both sides count the same."""
    rollout.pause()
    rollout.drain(DRAIN_TIMEOUT_S)
    return {server.address: server.requests for server in rollout.statistics()}
