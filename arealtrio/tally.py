"""What an engine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Tally:
    """The counters of an engine as it runs; ``EngineStatistics`` says what each means."""

    failovers: int = 0
    interruptions: int = 0
    aborts_sent: int = 0
    tokens_generated: int = 0
    tokens_kept: int = 0
    tokens_regenerated: int = 0
    tokens_lost: int = 0
    tokens_discarded: int = 0
    joints_kept: int = 0
    joints_moved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """An engine's numbers at one moment, since it was opened.

    Args:
        failovers: Times that a generation went on after its server failed it.
        interruptions: Times that a server was told to abort a generation, which then went on.
        aborts_sent: Requests that a server was asked to drop, because nobody waits for them.
        tokens_generated: Tokens that came and became part of a generation.
        tokens_kept: Tokens that generations had at their fail-overs, and did not make again.
        tokens_regenerated: Tokens made again after a fail-over, at most. How far a server was that
            died without a word is not known, so this is what replaced its answer.
        tokens_lost: Tokens that came and could not be used: their server broke its word on them, or
            they were streamed to a generation that could not go on from them, or was cancelled.
        tokens_discarded: Tokens of generations that ended without an answer, cancelled or failed.
            The answers hold ``tokens_generated - tokens_discarded``.
        joints_kept: Segments that went on in the slot of the one before, where the prefix is.
        joints_moved: Segments that went on elsewhere, because a server had clearly less to do.
        affinity_hits: Requests that ran on the server that holds their session's prefix.
        affinity_spills: Requests whose session's server was full, so that they ran elsewhere.
        affinity_moves: Sessions that moved to another server.
    """

    failovers: int
    interruptions: int
    aborts_sent: int
    tokens_generated: int
    tokens_kept: int
    tokens_regenerated: int
    tokens_lost: int
    tokens_discarded: int
    joints_kept: int
    joints_moved: int
    affinity_hits: int
    affinity_spills: int
    affinity_moves: int
