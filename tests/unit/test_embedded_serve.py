"""How the embedded server starts and ends, in a block and as a process."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from arealtrio.embedded.serve import GRACE_S, RunningServer, ServerSettings, running_server, serve
from arealtrio.embedded.settings import DialectName
from arealtrio.errors import ConfigError

from .embedded_server import ENDLESS, PROMPT, Watch, open_line, save_weights

LONG = {"prompt": PROMPT, "return_token_ids": True, **ENDLESS}
SLOW_S = 0.05  # of a decode step: an endless answer would take a minute


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_weights(tmp_path, 1)


async def test_stopping_answers_what_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = []
    async with open_line(tmp_path, monkeypatch, token_time_s=SLOW_S) as line:

        async def ask() -> None:
            answers.append(await line.ok("/v1/completions", LONG))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await line.watch.until(lambda scheduler: scheduler.counters.generated_tokens > 1)
            line.server.stop.set()
        await line.server.stopped.wait()
    assert answers[0]["choices"][0]["finish_reason"] == "abort"
    assert len(answers[0]["choices"][0]["token_ids"]) > 1


async def test_cancelling_ends_it_at_once_and_leaves_nothing(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held() -> int:
        gc.collect()
        return psutil.Process().num_fds()

    async with httpx.AsyncClient(timeout=30) as client:
        before = held()
        async with trio.open_nursery() as asking:
            async with trio.open_nursery() as serving:
                settings = ServerSettings(weights=weights, token_time_s=SLOW_S)
                server = await serving.start(serve, settings)
                watch = Watch(server.scheduler, monkeypatch)
                for stream in (True, False):
                    asking.start_soon(cut_off, client, server.url, {**LONG, "stream": stream})
                await watch.until(lambda scheduler: scheduler.counters.generated_tokens > 3)
                serving.cancel_scope.cancel()
            assert server.stopped.is_set()
            assert not server.scheduler.running
    assert held() <= before


async def cut_off(client: httpx.AsyncClient, url: str, body: Any) -> None:
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await client.post(f"{url}/v1/completions", json=body)


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_reader_that_does_not_read_cannot_hold_the_server(
    weights: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    body = (b'{"prompt":[3],"stream":true,"ignore_eos":true,"n":64,"logprobs":20,'
            b'"max_tokens":4000,"return_tokens_as_token_ids":true}')  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    settings = ServerSettings(weights=weights, max_num_seqs=64, max_model_len=4096)
    with trio.fail_after(60):
        async with trio.open_nursery() as serving:
            server: RunningServer = await serving.start(serve, settings)
            watch = Watch(server.scheduler, monkeypatch)
            port = int(server.url.rpartition(":")[2])
            async with await trio.open_tcp_stream("127.0.0.1", port) as stuck:
                await stuck.send_all(head.encode() + body)
                # Some 900 bytes a token: far more than the kernel buffers, so the write is stuck.
                await watch.until(lambda scheduler: scheduler.counters.generated_tokens > 12800)
                if how == "stop":
                    server.stop.set()
                else:
                    serving.cancel_scope.cancel()
                with trio.CancelScope(shield=True), trio.fail_after(10 * GRACE_S):
                    await server.stopped.wait()
    assert not server.scheduler.running


async def test_idle_it_takes_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_line(tmp_path, monkeypatch) as line:
        await line.ok("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True})
        steps: list[int] = []
        monkeypatch.setattr(line.scheduler, "step", lambda: steps.append(1))
        await line.client.get("/health")
        await line.client.get("/metrics")
        assert steps == []


async def test_a_step_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_line(tmp_path, monkeypatch, token_time_s=0.01) as line:
        start = trio.current_time()
        await line.ok("/v1/completions", {**LONG, "max_tokens": 20})
        assert trio.current_time() - start >= 20 * 0.01


async def test_a_taken_port_is_an_ordinary_error(weights: Path) -> None:
    async with running_server(ServerSettings(weights=weights)) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            async with running_server(ServerSettings(weights=weights, port=port)):
                pass


async def test_missing_weights_are_an_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with running_server(ServerSettings(weights=tmp_path / "none")):
            pass


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
async def test_it_listens_on_ipv6(weights: Path) -> None:
    async with (
        running_server(ServerSettings(weights=weights, host="::1")) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        assert server.url.startswith("http://[::1]:")
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "change",
    [{"port": -1}, {"max_num_seqs": 0}, {"max_model_len": 1}, {"token_time_s": float("nan")},
     {"token_time_s": -1.0}, {"logprobs_mode": "none"}, {"dialect": "none"},
     {"health_time_s": -1.0}, {"logprobs_mode": "scaled_logprobs"},
     {"logprobs_mode": "processed_logprobs", "dialect": "sglang"}],
)  # fmt: skip
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ServerSettings(weights=Path("x"), **change)


@pytest.mark.parametrize(
    ("dialect", "mode"), [("vllm", "raw_logprobs"), ("sglang", "scaled_logprobs")]
)
def test_each_dialect_has_its_own_logprobs(dialect: DialectName, mode: str) -> None:
    assert ServerSettings(weights=Path("x"), dialect=dialect).reported_logprobs == mode


async def test_a_process_speaks_the_dialect_it_was_told(weights: Path) -> None:
    options = ("--dialect", "sglang", "--incremental-streaming-output")
    async with process(weights, *options) as (_, url), httpx.AsyncClient() as client:
        info = (await client.get(f"{url}/server_info")).json()
    assert info["version"].startswith("0.5")
    assert info["incremental_streaming_output"]


@asynccontextmanager
async def process(weights: Path | None, *options: str) -> AsyncIterator[tuple[trio.Process, str]]:
    """The server as a process, and its address; whatever is left at the end is killed."""
    command = [sys.executable, "-X", "dev", "-m", "arealtrio.embedded", "--port", "0", *options]
    if weights is not None:
        command += ["--weights", str(weights)]
    root = Path(__file__).parents[2]
    started = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stderr is not None
    async with started.stdout, started.stderr:
        try:
            line = b""
            while not line.endswith(b"\n"):
                more = await started.stdout.receive_some()
                assert more, await started.stderr.receive_some()
                line += more
            announced = line.decode().split()
            assert announced[:2] == ["listening", "on"]
            yield started, announced[2]
        finally:
            if started.returncode is None:
                started.kill()
            with trio.CancelScope(shield=True):
                await started.wait()


async def everything(stream: trio.abc.ReceiveStream | None) -> bytes:
    assert stream is not None
    return b"".join([part async for part in stream])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_cleanly(weights: Path, number: signal.Signals) -> None:
    answers: list[httpx.Response] = []
    async with process(weights, "--token-time-s", str(SLOW_S)) as (started, url):
        assert started.stdin is not None
        async with started.stdin, httpx.AsyncClient(base_url=url, timeout=30) as client:
            async with client.stream(
                "POST", "/v1/completions", json={**LONG, "stream": True}
            ) as answer:
                parts = answer.aiter_lines()
                await anext(parts)
                started.send_signal(number)
                with trio.fail_after(1):
                    assert await started.wait() == 0
                rest = [part async for part in parts if part]
            assert '"finish_reason":"abort"' in rest[-2]
            assert rest[-1] == "data: [DONE]"
        assert answers == []
        assert await everything(started.stderr) == b""


async def test_the_process_ends_with_its_parent(weights: Path) -> None:
    async with process(weights, "--exit-with-parent") as (started, url):
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200
            assert started.stdin is not None
            await started.stdin.aclose()
            with trio.fail_after(1):
                assert await started.wait() == 0
        assert await everything(started.stderr) == b""


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def test_without_weights_it_serves_a_random_model_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path))
        async with process(None) as (started, url), httpx.AsyncClient(base_url=url) as client:
            answer = await client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 3})
            assert answer.json()["usage"]["completion_tokens"] <= 3
            assert len(files_in(tmp_path)) == 1
            started.send_signal(signal.SIGTERM)
            with trio.fail_after(10):
                assert await started.wait() == 0
    assert not files_in(tmp_path)


async def test_the_process_of_a_dead_engine_ends_with_an_error(weights: Path) -> None:
    async with process(weights) as (started, url):
        assert started.stdin is not None
        async with started.stdin, httpx.AsyncClient(base_url=url) as client:
            body = {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}}
            assert (await client.post("/collective_rpc", json=body)).status_code == 500
            answer = await client.post("/v1/completions", json={"prompt": PROMPT})
            assert answer.status_code == 500
            with trio.fail_after(1):
                assert await started.wait() == 1
        assert b"the engine died" in await everything(started.stderr)


async def test_the_process_says_why_it_cannot_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "arealtrio.embedded", "--weights", str(tmp_path / "none")]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 1
    assert b"none" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_an_announcement_that_can_not_be_written_is_an_ordinary_error(weights: Path) -> None:
    command = [sys.executable, "-m", "arealtrio.embedded", "--weights", str(weights)]
    with open("/dev/full", "wb") as full:
        pipe = subprocess.PIPE
        done = subprocess.run(command, stdout=full, stderr=pipe, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr == b"Error: [Errno 28] No space left on device\n"


async def test_a_process_whose_input_is_closed_has_no_parent_to_outlive(weights: Path) -> None:
    words = f'exec "{sys.executable}" -m arealtrio.embedded --exit-with-parent --weights "$0" <&-'
    command = ["sh", "-c", words, str(weights)]
    with trio.fail_after(30):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    assert done.stderr == b""
