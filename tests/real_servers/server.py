"""One real vLLM server as a child process: started, awaited, questioned, put back, stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

LAUNCH = Path(__file__).parent / "launch.py"

MODEL = "tiny"
CAP = 8  # requests a server runs at once
MAX_MODEL_LEN = 16384

HEALTH_INTERVAL_S = 0.25
STOP_LIMIT_S = 15.0
CALL_LIMIT_S = 60.0
LOG_TAIL_BYTES = 6000

FLAGS = (
    *("--served-model-name", MODEL),
    *("--host", "127.0.0.1"),
    *("--dtype", "float32"),
    *("--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", str(CAP)),
    *("--max-num-batched-tokens", "1024"),
    *("--kv-cache-memory-bytes", "64M"),
    *("--seed", "0"),
    "--enforce-eager",
    "--enable-scale-out",  # /inference/v1/generate, the route that reports weight versions
    "--disable-uvicorn-access-log",
    *("--distributed-executor-backend", "uni"),  # see ENVIRONMENT
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /pause, /resume, /collective_rpc, /weight_info
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_COMPILE_DISABLE": "1",  # else the first request for logprobs compiles for 20 s
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server binds to core 0
    "OMP_NUM_THREADS": "1",
    # "uni" runs the model in the engine's process, and is taken on a CPU only with this (a server's
    # engine is a process of its own all the same). Else the two wait for each other by
    # sched_yield(), a core each, and of two servers on two cores one may stand still for seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class Scored(NamedTuple):
    """One token in its context: its log-probability, and that of the likeliest token there."""

    logprob: float
    best: float


class ServerDied(Exception):
    """The server's process ended, or never became healthy; the message says what its log says."""


class VllmServer:
    """A vLLM server over one of the tiny models.

    Args:
        python: The interpreter of the environment that has vLLM.
        models: The folder with ``tiny-1`` … ``tiny-3``; the server starts with ``tiny-1``.
        folder: Its own folder, for its log and its temporary files. It runs in it: a path that is
            not absolute is another directory for each server.
    """

    def __init__(self, python: Path, models: Path, folder: Path) -> None:
        self.models = models
        self.folder = folder
        self.log = folder / "server.log"
        self._scratch = folder / "tmp"  # each start leaves a file in TMPDIR
        self._scratch.mkdir(parents=True)
        self._python = python
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process = self._start()
        self._client = httpx.Client(base_url=self.url, timeout=CALL_LIMIT_S, trust_env=False)

    def _start(self) -> subprocess.Popen[bytes]:
        vllm = (self._python, "-m", "vllm.entrypoints.openai.api_server")
        where = ("--model", self.models / "tiny-1", "--port", str(self._port))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, LAUNCH, str(os.getpid()), *vllm, *where, *FLAGS],
                env={**inherited_environment(), **ENVIRONMENT, "TMPDIR": str(self._scratch)},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own group, to be stopped as a whole
            )

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Send SIGKILL to the server and its workers, and wait until they are gone."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def start_again(self) -> None:
        """Start it anew on the port it had; ``wait_healthy`` waits for it.

        What is left of a server that ended by itself is killed first.
        """
        self.kill()
        self._process = self._start()

    def wait_healthy(self, deadline: float) -> None:
        """Return once ``/health`` answers 200; its own death ends the wait at once.

        Args:
            deadline: On ``time.monotonic``'s clock.
        """
        while not self._healthy():
            if time.monotonic() > deadline:
                raise ServerDied(f"{self.url} was not healthy in time; {self.last_words()}")
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(HEALTH_INTERVAL_S)
                raise ServerDied(f"{self.url} ended with {code} as it started; {self.last_words()}")

    def _healthy(self) -> bool:
        try:
            return self._client.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def call(self, method: str, path: str, json: Any = None) -> httpx.Response:
        """Send one request past the library, and insist on success."""
        if (code := self._process.poll()) is not None:
            raise ServerDied(f"{self.url} ended with {code}; {self.last_words()}")
        response = self._client.request(method, path, json=json)
        response.raise_for_status()
        return response

    def reset(self) -> None:
        """Put the server into the state every test begins with: idle, ``tiny-1``, version 0."""
        self.call("POST", "/abort_requests", {})
        self.call("POST", "/resume")
        self.load("tiny-1", version=0)

    def load(self, model: str, *, version: int) -> None:
        """Load another model's weights and label them."""
        reload = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(self.models / model)},
        }
        self.call("POST", "/collective_rpc", reload)
        self.call("POST", "/reset_prefix_cache")
        self.call("POST", "/update_weight_version", {"new_version": str(version)})

    def greedy(self, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        """Ask directly for the greedy continuation: ids and logprobs."""
        question = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        choice = self.call("POST", "/v1/completions", question).json()["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def score(self, ids: list[int]) -> list[Scored]:
        """Ask what the present weights think of each token but the first, in one forward pass."""
        question = {"model": MODEL, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 1}
        answer = self.call("POST", "/v1/completions", question).json()
        told = answer["choices"][0]["prompt_logprobs"][1:]
        return [
            Scored(
                logprob=candidates[str(token)]["logprob"],
                best=max(c["logprob"] for c in candidates.values()),
            )
            for token, candidates in zip(ids[1:], told, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """Sum each metric over its labels; gauges are as of the last engine step."""
        totals: dict[str, float] = {}
        for line in self.call("GET", "/metrics").text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                plain = name.split("{", 1)[0]
                totals[plain] = totals.get(plain, 0.0) + float(value)
        return totals

    def requests_seen(self) -> int:
        """Count the requests it has run to an end since it started."""
        return int(self.metrics().get("vllm:request_success_total", 0))

    def in_flight(self) -> int:
        """Count what runs and waits in it; a one-token request freshens the gauges first."""
        self.greedy([5], 1)
        now = self.metrics()
        return int(now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"])

    def last_words(self) -> str:
        """Return the end of its log."""
        if not self.log.is_file():
            return "it wrote no log"
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return f"the end of {self.log}:\n{log.read().decode(errors='replace')}"

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the server and the workers it started; ``stop`` waits for them."""
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Leave nothing of it: wait, then SIGKILL the group, and remove its temporary files."""
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._client.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def inherited_environment() -> dict[str, str]:
    """Return this process's environment without what would steer the server's interpreter."""
    steering = ("PYTHON", "VLLM_", "COV_", "PYTEST_")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering)}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
