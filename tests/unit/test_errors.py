"""The errors themselves: they travel with the batches that hold them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from arealtrio import errors

MADE = [
    errors.UsageError("said"),
    errors.WeightUpdateError("said", {"http://a": "refused"}),
    errors.TransportError("said", request_sent=False),
    errors.ConnectFailed("said"),
    errors.TransportTimeout("said", request_sent=False, limit="idle_s"),
    errors.ServerError("said", status=503),
    errors.RequestRejected("said", status=404),
    errors.RewardRaised("said", "Traceback …"),
    errors.RewardCrashed("said", -11),
    errors.TooManyFailures("said", [ValueError("a cause"), errors.ServerError("b", status=500)]),
]


def pickled(error: Exception) -> object:
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("again", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_whole(error: Exception, again: Callable[[Exception], object]) -> None:
    came = again(error)
    assert type(came) is type(error)
    assert (str(came), repr(came), came.__dict__) == (str(error), repr(error), error.__dict__)
