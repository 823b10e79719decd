"""What one HTTP request costs the client: CPU time, user and system, per request.

Closed loop: so many requests are in flight at any time, each answered after a delay that keeps the
rate, and with it the server and the client's share of a core, the same at every number in flight.
A request has 7 KB of body (a prompt of 1,024 tokens), its answer 160 bytes. Connections are open
before the measuring starts, except under httpx at 1,024, where stock httpx takes half a minute per
round. Clients take turns, and the ratio of medians is what is reported:
``cpu_us_per_request`` and ``ratio`` in each benchmark's extra information.

    pytest benchmarks/bench_transport.py        # about a minute
"""

import asyncio
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import httpx
import pytest
import trio
from pytest_benchmark.fixture import BenchmarkFixture

from arealtrio.transport import HttpTransport, HttpxTransport, ensure_descriptors
from arealtrio.types import HttpRequest, TimeLimits

BODY = b"[" + b"12345, " * 1023 + b"12345]"
RATE_PER_S = 2500
LIMITS = TimeLimits.of(300)

Ask = Callable[[], Awaitable[object]]
Measure = Callable[[str, int, int], float]
"""(server's URL, requests in flight, requests each) -> CPU seconds per request."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with delayed_server() as url:
        yield url


@contextmanager
def delayed_server() -> Iterator[str]:
    """Run ``http_server.py`` in a process of its own for the length of the block."""
    ensure_descriptors(10_000)
    script = Path(__file__).with_name("http_server.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Python's collector walks all that is alive, tasks first of all: not the pool's own cost."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def path(in_flight: int) -> str:
    return f"/{in_flight / RATE_PER_S:.3f}"


async def trio_round(ask: Ask, in_flight: int, each: int) -> None:
    async def worker() -> None:
        for _ in range(each):
            await ask()

    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(worker)


async def trio_cpu_s(ask: Ask, in_flight: int, each: int) -> float:
    """The first request of each worker opens its connection; it counts only where it is alone."""
    start = time.process_time()
    await trio_round(ask, in_flight, 1)
    if each == 1:
        return (time.process_time() - start) / in_flight
    start = time.process_time()
    await trio_round(ask, in_flight, each - 1)
    return (time.process_time() - start) / (in_flight * (each - 1))


def ours(url: str, in_flight: int, each: int) -> float:
    async def main() -> float:
        request = HttpRequest("POST", path(in_flight), BODY)
        async with HttpTransport(idle_per_origin=in_flight, keep_alive_s=60) as transport:
            return await trio_cpu_s(
                lambda: transport.request(url, request, LIMITS), in_flight, each
            )

    return trio.run(main)


def over_httpx(transport: Callable[[], httpx.AsyncBaseTransport]) -> Measure:
    def measure(url: str, in_flight: int, each: int) -> float:
        async def main() -> float:
            async with httpx.AsyncClient(transport=transport(), timeout=None) as client:
                target = url + path(in_flight)
                return await trio_cpu_s(lambda: client.post(target, content=BODY), in_flight, each)

        return trio.run(main)

    return measure


def our_pool() -> httpx.AsyncBaseTransport:
    return HttpxTransport(HttpTransport(keep_alive_s=60))


def stock_pool() -> httpx.AsyncBaseTransport:
    # No limits: a limit would make requests wait, and be cheaper for it.
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncHTTPTransport(limits=unlimited)


def aiohttp_client(url: str, in_flight: int, each: int) -> float:
    async def main() -> float:
        target = url + path(in_flight)
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def worker(count: int) -> None:
                for _ in range(count):
                    async with session.post(target, data=BODY) as response:
                        await response.read()

            await asyncio.gather(*(worker(1) for _ in range(in_flight)))
            start = time.process_time()
            await asyncio.gather(*(worker(each - 1) for _ in range(in_flight)))
            return (time.process_time() - start) / (in_flight * (each - 1))

    return asyncio.run(main())


def compare(
    benchmark: BenchmarkFixture,
    this: Callable[[], float],
    other: Callable[[], float],
    rounds: int = 3,
) -> float:
    """Measure both in turn; return the ratio of their medians. The table shows ``this``, whole."""
    mine: list[float] = []
    yours: list[float] = []
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: mine.append(this()), setup=lambda: yours.append(other()), rounds=rounds
    )
    medians = [statistics.median(mine) * 1e6, statistics.median(yours) * 1e6]
    benchmark.extra_info["cpu_us_per_request"] = [round(median) for median in medians]
    ratio = medians[0] / medians[1]
    benchmark.extra_info["ratio"] = round(ratio, 3)
    print(f"\n{benchmark.name}: {medians[0]:.0f} us against {medians[1]:.0f} us, ratio {ratio:.3f}")
    return ratio


pytestmark = pytest.mark.benchmark(timer=time.process_time, disable_gc=False)


def test_ours_against_aiohttp_at_256(benchmark: BenchmarkFixture, server: str) -> None:
    ratio = compare(benchmark, lambda: ours(server, 256, 7), lambda: aiohttp_client(server, 256, 7))
    assert ratio < 0.7


def test_ours_against_aiohttp_at_1024(benchmark: BenchmarkFixture, server: str) -> None:
    ratio = compare(
        benchmark, lambda: ours(server, 1024, 3), lambda: aiohttp_client(server, 1024, 3)
    )
    assert ratio < 0.7


@pytest.mark.usefixtures("no_collections")
def test_ours_at_4096_against_64(benchmark: BenchmarkFixture, server: str) -> None:
    ratio = compare(benchmark, lambda: ours(server, 4096, 3), lambda: ours(server, 64, 48), 1)
    assert ratio < 1.5


def test_httpx_over_ours_against_stock_at_64(benchmark: BenchmarkFixture, server: str) -> None:
    our_way, stock = over_httpx(our_pool), over_httpx(stock_pool)
    ratio = compare(benchmark, lambda: our_way(server, 64, 16), lambda: stock(server, 64, 9), 1)
    assert ratio < 1


def test_httpx_over_ours_against_stock_at_256(benchmark: BenchmarkFixture, server: str) -> None:
    our_way, stock = over_httpx(our_pool), over_httpx(stock_pool)
    ratio = compare(benchmark, lambda: our_way(server, 256, 5), lambda: stock(server, 256, 2), 1)
    assert ratio < 1 / 5


def test_httpx_over_ours_against_stock_at_1024(benchmark: BenchmarkFixture, server: str) -> None:
    our_way, stock = over_httpx(our_pool), over_httpx(stock_pool)
    ratio = compare(benchmark, lambda: our_way(server, 1024, 1), lambda: stock(server, 1024, 1), 1)
    assert ratio < 1 / 10
