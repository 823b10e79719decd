"""An inference server without a model: it says what vLLM says, and gives everybody one answer.

Run in a process of its own, so that what is measured is the client's alone:

    python -m benchmarks.inference_server --tokens 4096 --delay-s 0.1

prints its port and serves until its standard input ends. Without ``--delay-s`` a generation is
never answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from arealtrio.transport import ensure_descriptors

MODELS = {"data": [{"id": "model", "max_model_len": 100_000}]}


def http(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def completion(tokens: int) -> bytes:
    """An answer as vLLM 0.32 writes it, to a request for one logprob per token."""
    numbers = random.Random(0)
    ids = [numbers.randrange(150_000) for _ in range(tokens)]
    # The digits of a float32 printed as the float64 that equals it, about 17.
    logprobs = [-numbers.expovariate(1.5) for _ in range(tokens)]
    strings = [f"token_id:{token}" for token in ids]
    columns = {
        "text_offset": [0] * tokens,
        "token_logprobs": logprobs,
        "tokens": strings,
        "top_logprobs": [{s: logprob} for s, logprob in zip(strings, logprobs, strict=True)],
    }
    choice = {
        "index": 0,
        "text": "",
        "logprobs": columns,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": ids,
    }
    return json.dumps({"id": "cmpl-1", "choices": [choice]}, separators=(",", ":")).encode()


class Client(asyncio.Protocol):
    """One connection; knows just enough HTTP to find where a request ends."""

    def __init__(self, answer: bytes, delay_s: float | None) -> None:
        self.answer, self.delay_s = http(answer), delay_s
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end >= 0 and len(self.buffer) - end - 4 >= self.length(end):
            request = bytes(self.buffer[:end])
            self.buffer.clear()
            self.respond(request)

    def length(self, end: int) -> int:
        _, _, after = bytes(self.buffer[:end]).lower().partition(b"content-length:")
        return int(after.split(b"\r\n", 1)[0] or 0)

    def respond(self, request: bytes) -> None:
        path = request.split(b" ", 2)[1]
        if path == b"/health":
            self.write(http(b""))
        elif path == b"/v1/models":
            self.write(http(json.dumps(MODELS).encode()))
        elif path != b"/v1/completions":
            self.write(http(b'{"detail":"Not Found"}', "404 Not Found"))
        elif self.delay_s is not None:
            asyncio.get_running_loop().call_later(self.delay_s, self.write, self.answer)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)


async def serve(tokens: int, delay_s: float | None) -> None:
    loop = asyncio.get_running_loop()
    make = partial(Client, completion(tokens), delay_s)
    server = await loop.create_server(make, "127.0.0.1", 0, backlog=16_384)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def inference_server(*, tokens: int = 1, delay_s: float | None = None) -> Iterator[str]:
    """Run one in a process of its own for the length of the block; yields its URL."""
    command = [sys.executable, "-m", "benchmarks.inference_server", "--tokens", str(tokens)]
    if delay_s is not None:
        command += ["--delay-s", str(delay_s)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--delay-s", type=float)
    arguments = parser.parse_args()
    ensure_descriptors(11_000)
    asyncio.run(serve(arguments.tokens, arguments.delay_s))
