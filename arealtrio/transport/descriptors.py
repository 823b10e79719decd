"""The limit on open descriptors, checked at the start, not found out in the middle of a run."""

from __future__ import annotations

import resource

from ..errors import ConfigError


def ensure_descriptors(needed: int) -> int:
    """Raise this process's soft limit on open descriptors to ``needed`` where it is lower.

    Each request in flight holds one descriptor, and the usual soft limit is 1,024: past it, every
    further connection fails with ``EMFILE`` in the middle of a run. The limit is never lowered.

    Args:
        needed: Descriptors the process will hold at once: the requests in flight at most, the
            connections kept idle beside them, and some hundred for everything else.

    Returns:
        The soft limit now in force.

    Raises:
        ConfigError: The hard limit, which only an administrator raises, is below ``needed``; the
            soft limit is as it was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _covers(soft, needed):
        return soft
    if not _covers(hard, needed):
        raise ConfigError(_refusal(needed, hard))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as exc:  # macOS: the kernel's own limit lies below the hard one
        raise ConfigError(_refusal(needed, soft)) from exc
    return needed


def _covers(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed


def _refusal(needed: int, limit: int) -> str:
    return (
        f"{needed} open descriptors are needed and this process may hold {limit}: "
        f"raise its hard limit (`ulimit -Hn`, or LimitNOFILE= of its service) or "
        f"lower max_concurrent_rollouts"
    )
