"""The limit on open descriptors."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from arealtrio.errors import ConfigError
from arealtrio.transport import ensure_descriptors


@pytest.fixture
def lowered() -> Iterator[int]:
    """A soft limit of 256, and the true limits afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield 256
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_it_raises_the_soft_limit(lowered: int) -> None:
    assert ensure_descriptors(lowered + 50) == lowered + 50
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == lowered + 50


def test_it_never_lowers(lowered: int) -> None:
    assert ensure_descriptors(10) == lowered
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == lowered


def test_beyond_the_hard_limit_it_says_so_and_changes_nothing(
    lowered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (lowered, 4096))
    with pytest.raises(ConfigError, match=r"5000 open descriptors are needed .* may hold 4096"):
        ensure_descriptors(5000)
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == lowered


def test_a_kernel_that_refuses_is_a_configuration_error(
    lowered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(ConfigError, match="ulimit -Hn"):
        ensure_descriptors(lowered + 1)
    monkeypatch.undo()
