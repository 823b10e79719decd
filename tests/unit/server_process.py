"""Embedded servers as processes of their own, to be killed and started again on the same port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_LIMIT_S = 60


class ServerProcess:
    """One embedded server; it ends with this process.

    Args:
        weights: What it starts with.
        options: Further arguments of ``python -m arealtrio.embedded``.
    """

    def __init__(self, weights: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "arealtrio.embedded", "--weights", str(weights)]
        self._command += ["--exit-with-parent", *options]
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start; it takes the port it had before."""
        port = self.url.rpartition(":")[2] or "0"
        self._process = subprocess.Popen(
            [*self._command, "--port", port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def wait_listening(self) -> None:
        """Block until it accepts connections."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line.startswith("listening on "), line
        self.url = line.removeprefix("listening on ").strip()

    def kill(self) -> None:
        """Send SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            with self._process:  # closes its pipes
                pass
            self._process = None


@contextmanager
def two_processes(weights: Path, *options: str) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Run two servers around a block."""
    servers = ServerProcess(weights, *options), ServerProcess(weights, *options)
    try:
        for server in servers:  # both, before the first is waited for
            server.start()
        for server in servers:
            server.wait_listening()
        yield servers
    finally:
        for server in servers:
            server.kill()
