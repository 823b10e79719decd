"""A config is right, or one ConfigError at construction: nothing wrong is found out later."""

from __future__ import annotations

import logging
import socket
import traceback
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from arealtrio.config import RolloutConfig, normalise_address
from arealtrio.errors import ConfigError, NoServerAvailable
from arealtrio.executor import open_executor
from arealtrio.testing import simulated_executor
from arealtrio.transport.origin import Origin
from arealtrio.types import HttpRequest

NAMES = [field.name for field in fields(RolloutConfig)]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**20, 2**23, 2**40, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.sampled_from(["http://a", "http://a:80", "https://b:443/", "http://[", "http://a:x"])
    | st.builds(object),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just("http://a"), inner, max_size=2)
    ),
    max_leaves=5,
)


@given(name=st.sampled_from(NAMES), value=ANYTHING)
@example(name="headers", value=[("a", "b")])
@example(name="server_headers", value={"http://a": 5})
@example(name="max_requests_per_server", value={5: 1})
@example(name="failure_window", value=2**70)
@example(name="segment_timeout_s", value=10**400)
def test_any_value_of_any_field_gives_a_config_or_one_error(name: str, value: Any) -> None:
    with suppress(ConfigError):
        assert isinstance(RolloutConfig(**{name: value}), RolloutConfig)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "x"),
        ("seed", -1),
        ("seed", True),
        ("max_staleness", 2**40),
        ("consumer_batch_size", 2**24),
        ("max_concurrent_rollouts", 2**23),
        ("max_requests_per_server", 2**30),
        ("max_consecutive_failures", 2**63),
        ("max_failure_ratio", "x"),
        ("max_failure_ratio", True),
        ("max_failure_ratio", float("nan")),
        ("streaming", "no"),
        ("adaptive_caps", 1),
        ("allow_inexact_resume", None),
        ("model", 5),
        ("ca_file", "/nowhere/ca.pem"),
        ("servers", 5),
        ("backend", ["vllm"]),
        ("stall_warning_s", float("inf")),
        ("close_timeout_s", "10"),
        ("close_timeout_s", None),
        ("slow_step_warning_s", 0),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RolloutConfig(**{name: value})


def test_of_slow_steps_nobody_need_be_warned() -> None:
    assert RolloutConfig(slow_step_warning_s=None).slow_step_warning_s is None


def test_the_limits_of_the_window_are_checked_together() -> None:
    RolloutConfig(consumer_batch_size=2**20, max_staleness=2**18 - 1)
    with pytest.raises(ConfigError, match="max_staleness is 262144, consumer_batch_size 1048576"):
        RolloutConfig(consumer_batch_size=2**20, max_staleness=2**18)


@pytest.mark.parametrize("port", ["http://a:80", "HTTP://A:80/", "http://a/"])
def test_one_server_has_one_name(port: str) -> None:
    assert normalise_address(port) == "http://a"
    with pytest.raises(ConfigError, match="named twice: http://a;"):
        RolloutConfig(servers=["http://a", port])


def test_a_port_that_is_not_the_schemes_own_stays() -> None:
    for address in ("http://a:443", "https://a:80", "http://a:8000", "http://[::1]:8000"):
        assert normalise_address(address) == address
    assert normalise_address("https://[::1]:443") == "https://[::1]"


def test_a_file_that_is_there_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("")
    assert RolloutConfig(ca_file=str(path)).ca_file == str(path)


async def test_what_is_as_large_as_allowed_opens() -> None:
    async with simulated_executor(
        servers=1,
        consumer_batch_size=2**20,
        max_staleness=2**18 - 1,
        max_concurrent_rollouts=2**23 - 1,
        max_requests_per_server=2**20,
        max_consecutive_failures=2**48,
        failure_window=2**48,
        seed=2**200,
    ) as (executor, _):
        assert executor.get_capacity() > 0


# --- headers: they hold secrets ------------------------------------------------------------------

SECRET = "sk-proj-0123456789"


@pytest.mark.parametrize("field", ["headers", "server_headers"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", f"Bearer {SECRET}\n"),  # as read from a file
        ("Authorization", f"Bearer {SECRET}\r\nX-Injected: 1"),
        ("Authorization", f"Bearer {SECRET}\0"),
        ("Authorization", f"Bearer {SECRET}\x7f"),
        ("Authorization", f"Bearer “{SECRET}”"),  # out of a word processor
        ("Authorization", SECRET.encode()),
        (f"Authorization: {SECRET}", "x"),
        ("", SECRET),
        (f"{SECRET}\r\n", "x"),
        ("Ключ", SECRET),
        ("Content-Length", SECRET),
        (5, SECRET),
    ],
)
def test_a_header_that_http_can_not_send_is_refused_and_not_repeated(
    field: str, name: Any, value: Any
) -> None:
    headers = {name: value}
    given = headers if field == "headers" else {"http://a": headers}
    with pytest.raises(ConfigError, match="header") as caught:
        RolloutConfig(servers=["http://a"], **{field: given})  # type: ignore[arg-type]
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=8), max_size=2))
@example({"x-key": "ÿ\t~"})
def test_every_header_that_is_taken_can_be_sent(headers: dict[str, str]) -> None:
    with suppress(ConfigError):
        config = RolloutConfig(servers=["http://a"], headers=headers)
        head = Origin("http://a").head(HttpRequest("POST", "/"), config.headers_of("http://a"))
        assert head.count(b"\r\n") == head.count(b"\n")


async def test_no_key_is_logged_or_shown(
    unused_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = RolloutConfig(
        servers=[f"http://127.0.0.1:{unused_port}"],
        headers={"Authorization": SECRET},
        server_headers={f"http://127.0.0.1:{unused_port}": {"X-Key": SECRET}},
        setup_timeout_s=0.2,
        probe_interval_s=0.05,
    )
    with caplog.at_level(logging.DEBUG), pytest.raises(NoServerAvailable) as caught:
        async with open_executor(config):
            pass
    shown = [repr(config), str(config), caplog.text, *traceback.format_exception(caught.value)]
    assert not [text for text in shown if SECRET in text]


async def test_a_key_that_a_server_repeats_is_not_logged_or_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By who wants another key, and so is never in service."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            trio.serve_tcp, partial(refuse, b"invalid key " + SECRET.encode()), 0
        )
        port = listeners[0].socket.getsockname()[1]
        config = RolloutConfig(
            servers=[f"http://127.0.0.1:{port}"],
            headers={"Authorization": f"Bearer {SECRET}"},
            setup_timeout_s=0.5,
        )
        with caplog.at_level(logging.DEBUG), pytest.raises(NoServerAvailable) as caught:
            async with open_executor(config):
                pass
        nursery.cancel_scope.cancel()
    assert "invalid key ***" in str(caught.value)
    shown = [caplog.text, *traceback.format_exception(caught.value)]
    assert not [text for text in shown if SECRET in text]


async def refuse(words: bytes, stream: trio.SocketStream) -> None:
    head = b"HTTP/1.1 401 Unauthorized\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n"
    with suppress(trio.BrokenResourceError):
        async with stream:
            async for _ in stream:
                await stream.send_all(head % len(words) + words)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
