"""Embedded servers as processes of their own, none of which outlives its parent."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import NoServerAvailable

_ANNOUNCEMENT = b"listening on "
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """One running server.

    Args:
        url: Where it listens.
        process: What it is; its standard input is the pipe whose end makes it leave.
        log: What it wrote to standard error.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def check_alive(self) -> None:
        """Raise NoServerAvailable, with the server's last words, if it has ended."""
        status = self.process.poll()
        if status is not None:
            raise NoServerAvailable(
                f"server {self.url} ended with status {status}{_last_words(self.log)}"
            )


@contextmanager
def server_processes(
    count: int, weights: Path, logs: Path, options: Sequence[str] = ()
) -> Iterator[list[ServerProcess]]:
    """Run ``count`` embedded servers around a block; leaving it ends them, however it is left.

    They are asked to stop when the block ends well, and killed at once when it ends otherwise.
    A server also ends by itself when this process dies, because its standard input then ends. It
    has a session of its own, so that a Ctrl-C in the terminal reaches this process alone, which
    then ends the rollouts before the servers.

    Args:
        count: How many.
        weights: Directory of the first weights.
        logs: Existing directory for what they write to standard error.
        options: Further arguments of ``python -m arealtrio.embedded``.

    Raises:
        NoServerAvailable: One ended, or said nothing, instead of listening; the others are ended.
    """
    # -P: the arealtrio that runs here, and not a checkout's sources in the working directory.
    command = [sys.executable, "-P", "-m", "arealtrio.embedded", "--weights", str(weights)]
    with ExitStack() as stack:
        logged = [logs / f"server-{number}.log" for number in range(count)]
        # All are started before the first is waited for: they import at the same time.
        processes = [_start([*command, *options], log, stack) for log in logged]
        deadline = time.monotonic() + _START_TIMEOUT_S
        yield [
            ServerProcess(_wait_for_url(process, log, deadline), process, log)
            for process, log in zip(processes, logged, strict=True)
        ]
        # Only a block that ended well waits for a farewell; a Ctrl-C must not.
        _ask_to_stop(processes)


def _start(command: Sequence[str], log: Path, stack: ExitStack) -> subprocess.Popen[bytes]:
    with log.open("wb") as errors, _signals_held():
        process = subprocess.Popen(
            [*command, "--port", "0", "--exit-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            # Its products are tiny: threads would only spin against the other servers.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        stack.enter_context(process)  # closes its pipes and waits for it
        stack.callback(process.kill)  # before that; harmless once it has ended
    return process


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block.

    Between its start and its place in the stack a process belongs to nobody: a KeyboardInterrupt
    there would leave it behind.
    """
    held: list[int] = []
    try:
        before = {
            blocked: signal.signal(blocked, lambda number, _: held.append(number))
            for blocked in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread, which is the only one that they interrupt
        before = {}
    try:
        yield
    finally:
        for blocked, handler in before.items():
            signal.signal(blocked, handler)
        for number in held:
            signal.raise_signal(number)


def _ask_to_stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):  # then it is killed
            process.wait(max(deadline - time.monotonic(), 0))


def _wait_for_url(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    assert process.stdout is not None
    line = _read_line(process.stdout, deadline)
    if not line.startswith(_ANNOUNCEMENT):
        raise NoServerAvailable(f"an embedded server did not start{_last_words(log)}")
    return line.removeprefix(_ANNOUNCEMENT).decode().strip()


def _read_line(pipe: IO[bytes], deadline: float) -> bytes:
    """Return the first line; what there is of it at the deadline or at the end of the pipe."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(deadline - time.monotonic(), 0)):
            piece = os.read(pipe.fileno(), 1)  # by the byte: what follows the line stays unread
            if not piece:
                break
            line += piece
    return line


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f": {said[-1]}" if said else ""
