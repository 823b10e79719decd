"""Every error of arealtrio, named for who did it.

    ArealTrioError
    ├─ ConfigError (ValueError)            you configured it wrong
    ├─ UsageError (RuntimeError)           you called it wrong: settle twice, use after close
    ├─ InvalidRequest (ValueError)         a request that no server should see; nothing was sent
    ├─ RolloutClosed                       you closed it while something still waited
    ├─ RolloutCrashed                      our side died; the cause is attached
    ├─ StalenessBudgetExhausted            the call cannot be served before the next weight version
    ├─ LedgerError                         the ledger's file: full, locked, damaged, another run's
    ├─ WeightUpdateError                   too few servers took the weights; the version stays
    ├─ TooManyFailures (ExceptionGroup)    the failure budget is spent; the real causes are inside
    └─ RolloutError                        one rollout failed: recorded, it never ends the run
       ├─ TransportError                   no whole answer arrived (connect, reset, time-out)
       │  ├─ ConnectFailed                 nothing was sent: safe to send again
       │  ├─ TransportTimeout              a named limit passed
       │  └─ ResponseTooLarge              the answer is above the named size
       ├─ ServerError                      the server answered 5xx
       ├─ RequestRejected                  the server answered 4xx: it refuses what was asked
       ├─ ProtocolError                    the answer does not follow the dialect
       ├─ NoServerAvailable                no server could take the request
       ├─ DeadlineExceeded                 the rollout's own deadline passed
       ├─ TooStale                         it can not be consumed within max_staleness any more
       └─ WorkflowError                    user code broke its contract
          └─ RewardError                   a reward function in a RewardPool gave no reward
             ├─ RewardTimedOut             it took too long; its process was killed
             ├─ RewardRaised               it raised; with its traceback from there
             └─ RewardCrashed              its process died

Foreign exceptions are mapped once, at the door they came in through, with ``raise … from exc``.
No message carries a payload: a prompt can be a megabyte, and can be secret.
"""

from collections.abc import Sequence
from typing import Any, Self


class ArealTrioError(Exception):
    """Root of the tree; catching it catches everything this library raises on purpose.

    It can be copied and pickled, since a batch holds errors: a trainer of several processes sends
    it to all of them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Without ``__init__``, which takes other arguments than the message in many of them."""
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[ArealTrioError], args: tuple[Any, ...]) -> ArealTrioError:
    return kind.__new__(kind, *args)


class ConfigError(ArealTrioError, ValueError):
    """A configuration value is out of its range, or contradicts another one."""


class UsageError(ArealTrioError, RuntimeError):
    """A call that its object cannot serve in its present state; nothing was changed."""


class InvalidRequest(ArealTrioError, ValueError):
    """A generation request refused before anything was sent."""


class RolloutClosed(ArealTrioError, RuntimeError):
    """The executor or controller was closed while this call waited, or before it was made."""


class RolloutCrashed(ArealTrioError, RuntimeError):
    """The rollout side died; ``__cause__`` says of what. Close it and start a new one."""


class StalenessBudgetExhausted(ArealTrioError, RuntimeError):
    """Admission cannot produce what was asked for before the next weight version.

    Waiting would never end: the caller that waits is the one who has to advance the version.
    """


class LedgerError(ArealTrioError, RuntimeError):
    """The ledger can not be written, read, or trusted; the message says why and what to do.

    What was durable before stays so, and nothing is delivered that the ledger does not know of.
    """


class WeightUpdateError(ArealTrioError, RuntimeError):
    """Fewer than ``min_updated`` servers took the weights; the version was not advanced.

    Args:
        message: What happened and what to do.
        failed: The error of each server that failed, by address.
    """

    def __init__(self, message: str, failed: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.failed = dict(failed or {})


class TooManyFailures(ArealTrioError, ExceptionGroup[Exception]):
    """So many groups failed, or were rejected, that going on would only repeat it; it holds why."""

    def __new__(cls, message: str, exceptions: Sequence[Exception]) -> Self:
        """An ExceptionGroup fixes its message and members in ``__new__``."""
        return ExceptionGroup.__new__(cls, message, exceptions)

    def derive(self, excs: Sequence[Exception]) -> "TooManyFailures":  # type: ignore[override]
        """Keep the type when ``except*`` splits the group."""
        return TooManyFailures(self.message, excs)


class RolloutError(ArealTrioError):
    """One rollout failed. It is recorded with the rollout and never ends the run."""


class TransportError(RolloutError):
    """No whole answer arrived.

    Args:
        message: What was tried, of which server.
        request_sent: Whether any byte of the request may have reached the server. Only where it is
            False may the same request be sent again without a second generation.
    """

    def __init__(self, message: str, *, request_sent: bool = True) -> None:
        super().__init__(message)
        self.request_sent = request_sent


class ConnectFailed(TransportError):
    """No connection: refused, unreachable, unknown host name, or a failed TLS handshake."""

    def __init__(self, message: str) -> None:
        super().__init__(message, request_sent=False)


class TransportTimeout(TransportError):
    """A named limit passed before the answer was whole.

    Args:
        message: Which limit, of which server.
        request_sent: As for TransportError.
        limit: The field of TimeLimits that passed.
    """

    def __init__(self, message: str, *, request_sent: bool = True, limit: str = "total_s") -> None:
        super().__init__(message, request_sent=request_sent)
        self.limit = limit


class ResponseTooLarge(TransportError):
    """The answer is larger than ``response_size_bytes``."""


class ServerError(RolloutError):
    """The server answered with a 5xx status.

    Args:
        message: The server's own short reason.
        status: The HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


NOT_THE_CONTENT = frozenset({401, 403, 404, 405, 407, 408, 421, 425, 426, 429})
"""4xx that say nothing of what was asked (RFC 9110 §15.5, RFC 8470 §5.2, RFC 6585 §4): who asks, of
whom, by which route, how fast. Another server may answer the same request, or this one later."""


class RequestRejected(RolloutError):
    """The server answered with a 4xx status.

    Most of them say that the request is wrong, and stays wrong if it is sent again.

    Args:
        message: The server's own short reason.
        status: The HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_of_the_content(self) -> bool:
        """Whether it says that what was asked is wrong, and not the state of the server."""
        return self.status not in NOT_THE_CONTENT

    @property
    def is_of_the_route(self) -> bool:
        """Whether the server does not have what was asked for, or not by this method."""
        return self.status in (404, 405)


class ProtocolError(RolloutError):
    """The answer does not follow the dialect (HTML, truncated JSON, lists of unequal length, …)."""


class NoServerAvailable(RolloutError):
    """No server could take the request within its named time."""


class DeadlineExceeded(RolloutError):
    """The rollout's own deadline, ``rollout_timeout_s``, passed."""


class TooStale(RolloutError):
    """A rollout can no longer be consumed within ``max_staleness``."""


class WorkflowError(RolloutError):
    """A workflow, filter or reward broke its contract: a wrong type, arrays of unequal length."""


class RewardError(WorkflowError):
    """A reward function in a RewardPool gave no reward; it was called once, and is not again."""


class RewardTimedOut(RewardError):
    """A reward took longer than its ``timeout_s``; the process that ran it was killed."""


class RewardRaised(RewardError):
    """A reward function raised.

    Args:
        message: Which function, and the type of what it raised.
        remote_traceback: The traceback as text, from the process it ran in. It is in a note as
            well, and so is shown with this exception's own.
    """

    def __init__(self, message: str, remote_traceback: str) -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        self.add_note(f"In the reward's process:\n{remote_traceback.rstrip()}")


class RewardCrashed(RewardError):
    """The process that ran a reward died: a segmentation fault, ``os._exit``, out of memory.

    Args:
        message: Which function, and how its process ended.
        exitcode: The process's; ``-n`` where signal n ended it.
    """

    def __init__(self, message: str, exitcode: int | None) -> None:
        super().__init__(message)
        self.exitcode = exitcode
