"""What people get wrong: each is one clear error, at once, and leaves nothing behind."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from arealtrio import (
    ArealTrioError,
    NoServerAvailable,
    RolloutConfig,
    RolloutController,
    TooManyFailures,
    open_executor,
)
from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.serve import ServerSettings, running_server
from arealtrio.workflow import Engine


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    TinyModel.random(0, vocab_size=40, eos_id=0).save(tmp_path / "v0")
    return tmp_path / "v0"


@pytest.fixture
def port_in_use() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run_serve(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-P", "-c", "from arealtrio.cli import main; main()", "serve"]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


def test_serving_no_weights(tmp_path: Path) -> None:
    assert run_serve("--weights", str(tmp_path)) == (1, f"Error: no weights.npz in {tmp_path}\n")


def test_serving_on_a_port_in_use(weights: Path, port_in_use: int) -> None:
    status, words = run_serve("--weights", str(weights), "--port", str(port_in_use))
    assert status == 1
    assert words.startswith("Error: ")
    assert f"{port_in_use}" in words
    assert words.count("\n") == 1


def opened(url: str, **more: Any) -> None:
    with RolloutController(RolloutConfig(servers=[url], **more)):
        raise AssertionError("it opened")


def nothing_left(before: set[int]) -> bool:
    return {connection.fd for connection in psutil.Process().net_connections()} <= before


def test_an_unreachable_server_is_named(unused_port: int) -> None:
    before = {connection.fd for connection in psutil.Process().net_connections()}
    url = f"http://127.0.0.1:{unused_port}"
    with pytest.raises(NoServerAvailable, match=f"not ready within setup_timeout_s=0.1: {url}: no"):
        opened(url, setup_timeout_s=0.1)
    assert nothing_left(before)


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
async def test_a_server_that_answers_html_is_not_waited_for(backend: str) -> None:
    """It is up, and no inference server: more waiting would not help."""
    page = b"<html><body>welcome</body></html>"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(page)

    async def answer(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            await stream.send_all(head + page)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, answer, 0)
        url = f"http://localhost:{listeners[0].socket.getsockname()[1]}"
        config: dict[str, Any] = {"servers": [url], "backend": backend}
        with pytest.raises(
            NoServerAvailable, match=r"not usable: expected .* of text/html"
        ) as said:
            async with open_executor(RolloutConfig(**config)):
                raise AssertionError("it opened")
        assert "welcome" not in str(said.value), "a payload in a message"
        nursery.cancel_scope.cancel()


class Raises:
    """A workflow with a mistake in it."""

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> None:
        raise KeyError("answer")


async def test_a_workflow_that_always_raises_ends_the_wait_with_its_error(weights: Path) -> None:
    async with running_server(ServerSettings(weights=weights)) as server:
        config = RolloutConfig(servers=[server.url], max_consecutive_failures=3)
        async with open_executor(config) as rollout:
            with pytest.raises(TooManyFailures) as failures:
                await rollout.prepare_batch([{"input_ids": [1]}] * 9, Raises())
        assert [type(error) for error in failures.value.exceptions] == [KeyError] * 3
        assert isinstance(failures.value, ArealTrioError)
        assert not server.scheduler.running
