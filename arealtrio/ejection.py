"""Ejection: what requests and health checks say of a server, and when it is out of service for it.

How a server that is out comes back is in ``supervision``.
"""

from __future__ import annotations

from .config import RolloutConfig
from .errors import RolloutError, TransportError
from .fleet import Fleet
from .leases import LeaseQueue
from .server import IN_SERVICE, LEAVING, OUT_OF_ORDER, Server, ServerState


class Ejection:
    """The judge of the servers: counts what each fails, ejects it, and takes it back on trial.

    Every decision is a synchronous function, so no task sees it half made.

    Args:
        config: How many failures in a row are too many.
        fleet: The servers; never is the last half of them ejected on a signal that can be wrong.
        leases: The queue, whose waiters may use a server again that was found well.
    """

    def __init__(self, config: RolloutConfig, fleet: Fleet, leases: LeaseQueue) -> None:
        self._config = config
        self._fleet = fleet
        self._leases = leases

    def succeeded(self, server: Server) -> None:
        """A request to a server went well; one on trial may have one more at once.

        So what it may have doubles with each round of requests: TCP's slow start (RFC 5681 §3.1).
        """
        server.failures = 0
        if server.state not in IN_SERVICE:
            return  # it was sent before the server went out of service, and proves nothing
        if server.trial_cap is None:
            server.probes = 0
            return
        server.trial_cap += 1
        if server.trial_cap >= server.cap:
            server.trial_cap = None
        self._fleet.set_state(server, server.state, server.reason)

    def failed(self, server: Server, error: RolloutError) -> None:
        """A request to a server failed; too many in a row eject it."""
        server.failures += 1
        self._judge(server, server.failures, error)

    def healthy(self, server: Server) -> None:
        """A health check went well. It says nothing of requests, so their count stands."""
        server.sick = 0

    def unhealthy(self, server: Server, error: RolloutError) -> None:
        """A health check or a probe failed; too many in a row eject the server.

        One that is out of service and can not be reached loses what it was sent before, too: else
        those requests would wait for an answer until ``segment_timeout_s``.
        """
        server.sick += 1
        self._judge(server, server.sick, error)
        unreachable = isinstance(error, TransportError)
        if unreachable and server.state in OUT_OF_ORDER and self._is_too_many(server.sick):
            server.cut_off()

    def _judge(self, server: Server, failures: int, error: RolloutError) -> None:
        """Eject a server that failed too often; one on trial, at once."""
        if server.state is not ServerState.READY:
            return
        if server.trial_cap is None and not self._is_too_many(failures):
            return
        if isinstance(error, TransportError) and not error.request_sent:
            self._eject(server, error)  # nobody is there: no signal that could be wrong
        elif self._may_eject_another():
            self._eject(server, error)

    def _is_too_many(self, failures: int) -> bool:
        return failures >= self._config.eject_after_failures

    def _may_eject_another(self) -> bool:
        """Never the last half of the fleet on a signal that can be wrong for all at once."""
        fleet = sum(s.state not in LEAVING for s in self._fleet.servers)
        return 2 * (len(self._fleet.in_service) - 1) >= fleet

    def _eject(self, server: Server, error: RolloutError) -> None:
        server.ejections += 1
        server.trial_cap = 1  # for when it returns
        self._fleet.set_state(server, ServerState.EJECTED, f"{type(error).__name__}: {error}")

    def take_back(self, server: Server) -> None:
        """Put a server into service that was found well: what it failed before, it may have."""
        server.failures = 0
        self._leases.forgive(server.address)
        self._fleet.set_state(server, ServerState.READY)
