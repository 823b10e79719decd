"""The invariants of a run, each a small function that says which one broke and what was seen.

They share no code with what they judge. Where two books are kept (the executor's counts and the
staleness manager's; what the pool believes and what a server does) they are held to each other, and
both to what the simulation saw for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from arealtrio import Batch, Group, ModelResponse, RolloutConfig, Trajectory
from arealtrio.staleness import RolloutStat
from arealtrio.testing import EOS, SimulatedServer, made_by

REFUSALS_MOST = 20
"""Updates in a row that may be needed until a batch can be had; no plan has so large a window."""


class Violation(Exception):
    """An invariant did not hold.

    Args:
        invariant: Which.
        seen: What was seen instead.
    """

    def __init__(self, invariant: str, seen: str) -> None:
        super().__init__(f"{invariant}: {seen}")
        self.invariant = invariant


class _Server(Protocol):
    """What the pool says of a server; see ``Server`` and ``ServerStatistics``."""

    address: str
    version: int


def violated(invariant: str, seen: str) -> NoReturn:
    """Raise."""
    raise Violation(invariant, seen)


# --- I1: every submission is somewhere, and in one place -------------------------------------


def i1_counts_add_up(counts: Mapping[str, int]) -> None:
    """Submitted is what is queued, running and settled; none is negative."""
    parts = {name: count for name, count in counts.items() if name != "submitted"}
    if counts["submitted"] != sum(parts.values()) or min(counts.values()) < 0:
        violated("I1", f"the counts do not add up: {dict(counts)}")


def i1_submissions_are_counted(counts: Mapping[str, int], submitted: int) -> None:
    """As many were counted as were handed over."""
    if counts["submitted"] != submitted:
        violated("I1", f"{submitted} were submitted, and {counts['submitted']} counted")


def i1_books_agree(counts: Mapping[str, int], stat: RolloutStat, recovered: int) -> None:
    """The staleness manager counts what the executor counts, and what came before this run."""
    ours = (counts["queued"], counts["running"], counts["accepted"] + recovered)
    theirs = (stat.enqueued, stat.running, stat.accepted)
    if ours != theirs:
        violated("I1", f"queued, running, accepted are {ours}, to the staleness manager {theirs}")


def i1_all_settled(counts: Mapping[str, int]) -> None:
    """Nothing is queued or running any more."""
    if counts["queued"] or counts["running"]:
        violated("I1", f"not everything has settled: {dict(counts)}")


def i1_outcomes_are_counted(counts: Mapping[str, int], seen: Mapping[str, int]) -> None:
    """Each outcome was counted as often as a result had it.

    What is discarded unseen, because it became too old, goes from accepted to expired.
    """

    def of(numbers: Mapping[str, int]) -> dict[str, int]:
        apart = {name: numbers.get(name, 0) for name in ("rejected", "failed", "cancelled")}
        kept = numbers.get("accepted", 0) + numbers.get("expired", 0)
        return {**apart, "accepted or expired": kept}

    if of(counts) != of(seen):
        violated("I1", f"the counts are {of(counts)}, the results were {of(seen)}")


# --- I2, I3: what may run --------------------------------------------------------------------


def i2_concurrency(running: int, counted: int, limit: int) -> None:
    """Members run up to the limit, and as many as are counted."""
    if running > limit:
        violated("I2", f"{running} members run, and {limit} may")
    if running > counted:
        violated("I2", f"{running} members run, and {counted} are counted as running")


def i3_admission(stat: RolloutStat, charged: int, version: int, config: RolloutConfig) -> None:
    """Never more than (max_staleness + version + 1) · batch accepted and running."""
    budget = (config.max_staleness + version + 1) * config.consumer_batch_size
    if stat.accepted + stat.running > budget:
        violated(
            "I3",
            f"{stat.accepted} accepted, {stat.running} running and {charged} charged in version "
            f"{version}, where {budget} may be",
        )


# --- I4, I5: slots ---------------------------------------------------------------------------


def i4_outstanding(address: str, outstanding: int, allowed: int) -> None:
    """A server that was just given a request may have so many."""
    if outstanding > allowed:
        violated("I4", f"{address} was given its request {outstanding}, and may have {allowed}")


def i4_server_has_no_more(server: SimulatedServer, most: int) -> None:
    """The server itself sees no more requests than the largest cap it ever had."""
    if server.generations > most:
        violated("I4", f"{server.address} works on {server.generations} requests of {most}")


def i4_nothing_outstanding(outstanding: Mapping[str, int]) -> None:
    """Every slot came back."""
    held = {address: count for address, count in outstanding.items() if count}
    if held:
        violated("I4", f"slots are held after the close: {held}")


def i5_no_free_slot(waiting: str, usable: Collection[str]) -> None:
    """Nobody waits for a slot that is free."""
    if usable:
        violated("I5", f"{waiting} waits, and {', '.join(sorted(usable))} could serve it")


def i5_no_idle_admission(queued: int, running: int, limit: int, capacity: int) -> None:
    """No prompt waits that may start."""
    if queued and running < limit and capacity > 0:
        violated(
            "I5",
            f"{queued} groups are queued, though {running} of {limit} members run and the "
            f"capacity is {capacity}",
        )


def i5_no_forgotten_batch(ready: int, size: int) -> None:
    """The trainer does not sleep while its batch is there."""
    if ready >= size:
        violated("I5", f"{ready} groups may leave, {size} make a batch, and the trainer sleeps")


# --- I6, I7: what is delivered ---------------------------------------------------------------


def i6_bound(group: Group, version: int, max_staleness: int) -> None:
    """No consumed token is older than max_staleness: as reported, and as it was really made."""
    for row in group.rows:
        oldest = min(row.versions[row.loss_mask == 1], default=version)
        if version - oldest > max_staleness:
            violated(
                "I6",
                f"{group.task_id} holds a token of version {oldest}, consumed in {version} "
                f"with max_staleness {max_staleness}",
            )


def i6_not_before_its_permit(group: Group) -> None:
    """No token is older than the permit that its group was started with."""
    oldest = group.head_version
    if oldest is not None and oldest < group.permit_version:
        violated(
            "I6",
            f"{group.task_id} holds a token of version {oldest}, and its permit is of "
            f"{group.permit_version}",
        )


def i6_violations_are_counted(counted: int, seen: int, *, at_the_end: bool = False) -> None:
    """Under ``keep`` what is too old is delivered, and counted, maybe before it is seen."""
    if counted < seen or (at_the_end and counted != seen):
        violated("I6", f"{seen} groups were delivered beyond the bound, and {counted} counted")


def i7_settles_once(task_id: str, before: str | None, again: bool) -> None:
    """A submission settles once; accepted and too old, it may be queued again.

    Args:
        task_id: Whose.
        before: How it settled before, if it did.
        again: Whether it was queued again since.
    """
    if before is not None and not (before == "accepted" and again):
        violated("I7", f"{task_id} settled twice; it was {before} before")


def i7_delivered_once(task_id: str, state: str | None) -> None:
    """What is delivered was accepted, and neither delivered before nor reported as expired."""
    if state != "accepted":
        violated("I7", f"{task_id} was delivered, though it is {state or 'unknown'}")


def i7_none_lost(left: Sequence[str]) -> None:
    """What was accepted was delivered, or reported as too old."""
    if left:
        violated("I7", f"accepted and never delivered: {', '.join(left[:5])} ({len(left)} in all)")


def i7_every_prompt(expected: Counter[str], accounted: Counter[str]) -> None:
    """Every prompt of an epoch is in one batch, or in the failures of one."""
    if expected != accounted:
        lost, extra = expected - accounted, accounted - expected
        violated("I7", f"of the epoch's prompts {dict(lost)} are missing, {dict(extra)} too many")


def i7_whole_group(group: Group, size: int, least: int) -> None:
    """A group has all its members; as few as its policy allows succeeded."""
    succeeded = sum(bool(rows) for rows in group.members)
    if len(group) != size or succeeded < least:
        violated(
            "I7", f"{group.task_id} has {succeeded} of {len(group)} members, {size} were asked for"
        )
    members = [row.member_index for row in group.rows]
    if members != sorted(set(members)):
        violated("I7", f"{group.task_id} has rows of the members {members}")


def i7_batch_size(batch: Batch, size: int, *, short: bool) -> None:
    """A batch has exactly ``consumer_batch_size`` groups, where nothing lets it be short."""
    if len(batch) > size or (len(batch) < size and not short):
        violated("I7", f"a batch has {len(batch)} groups, not {size}")


def i7_in_order(numbers: Sequence[int], before: int) -> None:
    """Under ``wait`` batches leave in the order of permits."""
    if numbers and min(numbers) <= before:
        violated("I7", f"permit {min(numbers)} was delivered after {before}")


# --- I8: tokens ------------------------------------------------------------------------------


def i8_lengths(name: str, vectors: Mapping[str, Any]) -> None:
    """Tokens, logprobs and versions are of one length."""
    lengths = {what: len(vector) for what, vector in vectors.items()}
    if len(set(lengths.values())) != 1:
        violated("I8", f"{name} has vectors of different lengths: {lengths}")


def i8_versions(name: str, versions: Any, lowest: int, newest: int) -> None:
    """Versions never decrease in a generation, nor leave what its servers had."""
    if len(versions) and (int(versions[0]) < lowest or int(versions[-1]) > newest):
        violated("I8", f"{name} has versions {versions.tolist()}, not in {lowest} … {newest}")
    if (np.diff(versions) < 0).any():
        violated("I8", f"{name} has versions that go back: {versions.tolist()}")


def i8_truth(name: str, logprobs: Any, versions: Any) -> None:
    """Each token carries the version of the weights that made it."""
    truth = [made_by(float(logprob)) for logprob in logprobs]
    if truth != versions.tolist():
        violated("I8", f"{name} is stamped {versions.tolist()}, and was made by {truth}")


def i8_content(name: str, tokens: Any, *, stopped: bool, stops: Collection[int]) -> None:
    """No token was lost, made twice, or belongs to another answer."""
    if (np.diff(tokens) != -1).any():
        violated("I8", f"{name} has lost or repeated tokens: {(tokens - EOS).tolist()}")
    ends = tokens[-1] if len(tokens) else None
    if stopped and ends not in (EOS, *stops):
        violated("I8", f"{name} stopped at {ends}, which ends nothing")
    if any(token < EOS for token in tokens):
        violated("I8", f"{name} has tokens that no model made: {tokens.tolist()}")


def i8_budget(name: str, response: ModelResponse, budget: int) -> None:
    """No more tokens than asked for; exactly so many where the budget ended it."""
    count = response.output_len
    if count > budget or (response.stop_reason == "length" and count != budget):
        violated("I8", f"{name} has {count} tokens of {budget} and ended by {response.stop_reason}")


def i8_row(row: Trajectory, *, truth: bool) -> None:
    """What reaches the trainer is what was generated, answer after answer."""
    made = row.loss_mask == 1
    name = f"a row of prompt {row.prompt_id}"
    if (row.versions[~made] != -1).any() or (row.versions[made] < 0).any():
        violated("I8", f"{name} has versions {row.versions.tolist()} on a mask of {made.tolist()}")
    if truth and row.versions_exact:
        i8_truth(name, row.logprobs[made], row.versions[made])


def i8_known_versions(name: str, *, exact: bool) -> None:
    """Where every server reports its versions, none is a belief."""
    if not exact:
        violated("I8", f"{name} has versions that are only believed")


# --- I9: what is left ------------------------------------------------------------------------


def i9_no_task(before: int, after: int) -> None:
    """Every task has ended."""
    if after > before:
        violated("I9", f"{after - before} tasks are left")


def i9_no_rollout(running: int) -> None:
    """Every member has left its workflow."""
    if running:
        violated("I9", f"{running} members run after the close")


def i9_no_request(server: SimulatedServer, forgotten: int = 0) -> None:
    """Nothing is running or waiting on a server.

    Args:
        server: The server.
        forgotten: Requests of which it never got the news that nobody waits for them.
    """
    scheduler = server.scheduler
    left = len(scheduler.running) + len(scheduler.waiting)
    if left > forgotten or server.generations:
        violated("I9", f"{server.address} still has {left} requests ({server.generations} open)")


def i9_not_paused(server: SimulatedServer) -> None:
    """A server in service generates."""
    if server.scheduler.pause_mode is not None:
        violated("I9", f"{server.address} was left paused ({server.scheduler.pause_mode})")


def i9_aborted(given_up: Collection[str]) -> None:
    """Whatever was sent and not answered was aborted by its id."""
    if given_up:
        some = ", ".join(sorted(given_up)[:5])
        violated("I9", f"given up and not aborted on the server: {some} ({len(given_up)} in all)")


# --- what must not happen, and what must -----------------------------------------------------


def refused_once(request_id: str, refused: Collection[str]) -> None:
    """A request that a server refused (4xx) is not sent again."""
    if request_id.rpartition("-")[0] in refused:
        violated("refused", f"{request_id} was sent though a server had refused that request")


def no_failure_of_its_own(outcome: str, kind: str, error: object) -> None:
    """Where no server fails, no rollout does on their account."""
    violated("calm", f"a rollout was {outcome} ({kind}) though nothing was wrong: {error!r}")


def exhausted_for_a_reason(running: int, capacity: int) -> None:
    """A call is refused for want of budget only where nothing runs and none is left."""
    if running or capacity > 0:
        violated(
            "budget", f"refused with {running} groups running and a capacity of {capacity} left"
        )


def liveness_of_updates(refusals: int, state: str) -> None:
    """A trainer that is told to update first is served after it did."""
    if refusals > REFUSALS_MOST:
        violated("liveness", f"refused for want of budget {refusals} times in a row\n{state}")


def liveness(waited_s: float, state: str) -> None:
    """With a healthy server every prompt settles."""
    violated("liveness", f"nothing has settled for {waited_s:g} s, and all was well\n{state}")


def comes_to_an_end(waited_s: float, state: str) -> None:
    """A run in which things settle is not caught in a circle."""
    violated(
        "liveness", f"things still settle after {waited_s:g} s, and the run has no end\n{state}"
    )
