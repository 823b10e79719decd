"""Which weights made which token: what a server reports, held to what the pool believes."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ProtocolError
from .servers import IN_SERVICE, Lease, ServerPool
from .types import Int32Array, vector_of
from .wire.dialect import SegmentResponse, VersionSpan


def versions_of(pool: ServerPool, lease: Lease, answer: SegmentResponse) -> tuple[Int32Array, bool]:
    """The version of each token of an answer, and whether they are known.

    The server's own spans win, but for a request with an adapter: it keeps the one it named,
    while the label, and so the spans, follow the newest. Without spans the version pinned when
    the lease was granted stands, exact unless an update landed on that server since, or nothing
    would tell that it was restarted.

    Raises:
        ProtocolError: If the server reports weights that nobody told it to load.
    """
    count = len(answer.token_ids)
    if lease.adapter_version is not None:
        exact = lease.server.base_update == lease.base_update
        return vector_of(lease.adapter_version, count), exact
    if answer.versions is None:
        first = pool.recipe == ()  # what a server starts with, it has whoever restarts it
        exact = lease.server.version == lease.version and (lease.server.tells_restarts or first)
        return vector_of(lease.version, count), exact
    versions = vector_of(lease.version, count)
    exact = True
    _check_belief(pool, lease, answer.versions)
    for span in answer.versions:
        if span.version is None:
            _check_unlabelled(lease)
            exact = False
            continue
        _check_span(pool, lease, span)
        versions[span.start : span.end] = span.version
    return versions, exact


def _check_belief(pool: ServerPool, lease: Lease, spans: Sequence[VersionSpan]) -> None:
    """Take a server out whose last tokens are of other weights than the pool believes it has.

    It restarted, or somebody else updates it. What else it is working on is lost as well. An
    update that lands while the answer is on its way moves the belief from the lease's version
    to what the server was told. One that takes no label says what it likes.
    """
    server = lease.server
    if not spans or not (lease.labelled or server.labelled):
        return
    bounds = (lease.version, server.version, server.told)
    if spans[-1].version not in range(min(bounds), max(bounds) + 1):
        words = f"it reports version {spans[-1].version}, not {server.version}"
        if server.state in IN_SERVICE:
            pool.mark_stale(server, words)
            server.cut_off()
        raise ProtocolError(f"{server.address}: {words}; its tokens are dropped")


def _check_unlabelled(lease: Lease) -> None:
    """Drop tokens of a server that had our label when it was asked: it restarted since."""
    if lease.labelled:
        raise ProtocolError(
            f"{lease.server.address} reports tokens of weights without our label, which it had: it "
            "was restarted, and they are of its first weights; its tokens are dropped"
        )


def _check_span(pool: ServerPool, lease: Lease, span: VersionSpan) -> None:
    version = span.version or 0
    if version > pool.newest_told:
        raise ProtocolError(
            f"{lease.server.address} reports tokens of version {version}, but no server was "
            f"told to load anything beyond {pool.newest_told}: does another trainer "
            "update it?"
        )
