from __future__ import annotations

import pytest

from arealtrio.errors import (
    ConnectFailed,
    DeadlineExceeded,
    InvalidRequest,
    NoServerAvailable,
    ProtocolError,
    RequestRejected,
    ServerError,
    TransportTimeout,
    UsageError,
    WorkflowError,
)
from arealtrio.settlement import Failure, RolloutCounts, classify
from arealtrio.types import FailureKind, Outcome

INFRASTRUCTURE, WORKFLOW, DATA = (
    FailureKind.INFRASTRUCTURE,
    FailureKind.WORKFLOW,
    FailureKind.DATA,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectFailed("c"), INFRASTRUCTURE),
        (TransportTimeout("t"), INFRASTRUCTURE),
        (ServerError("s", status=500), INFRASTRUCTURE),
        (ProtocolError("p"), INFRASTRUCTURE),
        (NoServerAvailable("n"), INFRASTRUCTURE),
        (DeadlineExceeded("d"), INFRASTRUCTURE),
        (InvalidRequest("i"), DATA),
        (RequestRejected("r", status=400), DATA),
        (RequestRejected("r", status=422), DATA),
        (RequestRejected("r", status=401), INFRASTRUCTURE),
        (RequestRejected("r", status=404), INFRASTRUCTURE),
        (RequestRejected("r", status=429), INFRASTRUCTURE),
        (WorkflowError("w"), WORKFLOW),
        (UsageError("u"), WORKFLOW),
        (KeyError("k"), WORKFLOW),
        (ExceptionGroup("g", [ConnectFailed("c"), KeyError("k")]), INFRASTRUCTURE),
        (ExceptionGroup("g", [ExceptionGroup("h", [InvalidRequest("i")])]), DATA),
    ],
)
def test_whose_failure_it_was(error: Exception, kind: FailureKind) -> None:
    assert classify(error) is kind


def test_a_failure_says_whose_it_was_and_where() -> None:
    error = KeyError("k")
    assert str(Failure(WORKFLOW, error, 2)) == "workflow failure in member 2: KeyError: 'k'"
    assert str(Failure(DATA, error)) == "data failure: KeyError: 'k'"


def test_counts_keep_their_sum() -> None:
    counts = RolloutCounts()
    for _ in range(6):
        counts.enqueue()
    for _ in range(4):
        counts.start()
    counts.settle(Outcome.ACCEPTED, was_running=True)
    counts.settle(Outcome.FAILED, was_running=True)
    counts.settle(Outcome.CANCELLED, was_running=False)
    assert counts.as_dict() == {
        "submitted": 6,
        "queued": 1,
        "running": 2,
        "accepted": 1,
        "rejected": 0,
        "failed": 1,
        "expired": 0,
        "cancelled": 1,
    }
    assert counts.of(Outcome.ACCEPTED) == 1
    assert "'queued': 1" in repr(counts)


@pytest.mark.parametrize("was_running", [True, False])
def test_settling_what_is_not_there_is_a_broken_invariant(was_running: bool) -> None:
    counts = RolloutCounts()
    with pytest.raises(AssertionError):
        counts.settle(Outcome.ACCEPTED, was_running=was_running)
    with pytest.raises(AssertionError):
        RolloutCounts().start()
