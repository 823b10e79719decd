"""A config is right, or one ConfigError at construction: nothing wrong is found out later."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arealtrio.config import RolloutConfig, normalise_address
from arealtrio.errors import ConfigError
from arealtrio.testing import simulated_executor

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
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RolloutConfig(**{name: value})


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
