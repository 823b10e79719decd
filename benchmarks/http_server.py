"""A server that answers every request after the same delay and costs as little as Python can.

Run in a process of its own, so that the CPU time measured is the client's alone:

    python benchmarks/http_server.py     # prints its port, serves until its standard input ends

``POST /0.25`` is answered after 0.25 s.
"""

import asyncio
import sys

ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-length: 160\r\ncontent-type: application/json\r\n\r\n" + b"x" * 160
)


class Delayed(asyncio.Protocol):
    """One connection; knows just enough HTTP to find where a request ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end or len(body) < self.length(head):
            return
        self.buffer = b""
        delay_s = float(head.split(b" ", 2)[1][1:])
        asyncio.get_running_loop().call_later(delay_s, self.answer)

    def length(self, head: bytes) -> int:
        return int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])

    def answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(ANSWER)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Delayed, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
