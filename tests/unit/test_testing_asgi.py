"""Asking the embedded server's handlers in memory, in turns or at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import pytest
import trio
from starlette.responses import Response
from trio.testing import MockClock

from arealtrio import TransportError
from arealtrio.embedded.settings import ServerSettings
from arealtrio.testing import (
    ScriptedModel,
    SimulatedServerSettings,
    checkpoint,
    open_fleet,
    run_virtually,
)
from arealtrio.testing.asgi import ask, ask_at_once
from arealtrio.testing.clockwork import Pace, TimedEngine, TimedScheduler
from arealtrio.testing.faces import Face, face_of
from arealtrio.testing.lengths import FixedLengths
from arealtrio.testing.timetable import Timetable
from arealtrio.types import HttpRequest, TimeLimits

Dialect = Literal["vllm", "sglang"]
LIMITS = TimeLimits.of(30.0)
VLLM = (
    HttpRequest("POST", "/pause?mode=keep"),
    HttpRequest("POST", "/pause?mode=abort"),
    HttpRequest("GET", "/weight_info"),
    HttpRequest("POST", "/update_weight_version", b'{"new_version": "3"}'),
    HttpRequest("POST", "/update_weight_version", b'{"new_version": 3}'),
    HttpRequest("POST", "/update_weight_version", b"{"),
    HttpRequest("POST", "/reset_prefix_cache?reset_running_requests=true"),
    HttpRequest("POST", "/resume"),
    HttpRequest("GET", "/metrics"),
)
SGLANG = (
    *(HttpRequest("POST", "/pause_generation", b'{"mode": "%s"}' % mode)
      for mode in (b"retract", b"in_place", b"abort", b"wait")),
    HttpRequest("GET", "/model_info"),
    HttpRequest("POST", "/update_weight_version", b'{"new_version": "3"}'),
    HttpRequest("POST", "/update_weight_version", b"{}"),
    HttpRequest("POST", "/continue_generation", b"{}"),
    HttpRequest("GET", "/metrics"),
)  # fmt: skip


def face(dialect: Dialect) -> Face:
    scheduler = TimedScheduler(
        Pace(0.01), FixedLengths(10), random.Random(0), lambda: 0.0,
        model=ScriptedModel(0), max_num_seqs=4, max_model_len=100,
    )  # fmt: skip
    return face_of(
        TimedEngine(scheduler, 0.0, Timetable()),
        ServerSettings(weights=Path(checkpoint(0)), dialect=dialect),
    )


@pytest.mark.parametrize(
    ("dialect", "request_"),
    [("vllm", one) for one in VLLM] + [("sglang", one) for one in SGLANG],
)
async def test_an_answer_at_once_is_that_of_the_application(
    autojump_clock: MockClock, dialect: Dialect, request_: HttpRequest
) -> None:
    one, other = face(dialect), face(dialect)
    handler = one.handler_at_once(request_)
    assert handler is not None
    at_once = ask_at_once(handler, request_)
    in_turns = await ask(other.app_for(request_), request_)
    assert at_once.status == in_turns.status
    assert at_once.headers == in_turns.headers
    assert at_once.body == in_turns.body


@pytest.mark.parametrize(
    ("dialect", "request_"),
    [
        ("vllm", HttpRequest("POST", "/pause?mode=wait")),
        ("vllm", HttpRequest("POST", "/collective_rpc", b'{"method": "reload_weights"}')),
        ("vllm", HttpRequest("GET", "/resume")),
        ("vllm", HttpRequest("GET", "/health")),
        ("sglang", HttpRequest("POST", "/update_weights_from_disk", b"{}")),
        ("sglang", HttpRequest("GET", "/pause_generation")),
    ],
)
async def test_what_may_wait_or_is_not_there_is_left_to_the_application(
    dialect: Dialect, request_: HttpRequest
) -> None:
    assert face(dialect).handler_at_once(request_) is None


async def test_a_handler_that_waits_does_not_answer_at_once() -> None:
    async def wait(*_: object) -> Response:
        await trio.sleep(1)
        return Response()

    with pytest.raises(RuntimeError, match="POST /slow waits"):
        ask_at_once(wait, HttpRequest("POST", "/slow"))


@pytest.mark.parametrize("seed", range(6))  # other orders of the tasks: at the head, at the body
def test_an_answer_is_lost_whose_server_dies_while_it_is_sent(seed: int) -> None:
    async def main() -> None:
        async with open_fleet([SimulatedServerSettings()]) as fleet:
            server, asked = fleet.servers[0], trio.Event()

            async def ask_it() -> None:
                asked.set()
                with pytest.raises(TransportError, match="reset the connection"):
                    await server.request(HttpRequest("GET", "/weight_info"), LIMITS)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_it)
                await asked.wait()
                server.die()

    run_virtually(main, seed=seed)


async def test_an_answer_whose_client_leaves_is_not_sent(autojump_clock: MockClock) -> None:
    async with open_fleet([SimulatedServerSettings()]) as fleet:
        with trio.CancelScope() as scope:
            scope.cancel()
            await fleet.servers[0].request(HttpRequest("GET", "/weight_info"), LIMITS)
        assert scope.cancelled_caught
