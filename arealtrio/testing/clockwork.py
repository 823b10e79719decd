"""The embedded server's state machine in continuous time.

The scheduler of the embedded server makes one token at a time because somebody's model has to. A
scripted answer is known beforehand, so here nothing happens between two events: whoever looks at
the scheduler, or changes it, first gets the decode steps that were due by then. Everything that is
decided (slots, queue, pause modes, aborts, labels, broken weights) is the base class's.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from ..embedded.engine import Engine, Generation
from ..embedded.sampling import SamplingParams
from ..embedded.scheduler import Model, Scheduler
from ..embedded.sequence import Sequence, Span
from ..types import PauseMode
from .lengths import Lengths
from .script import Plan, ScriptedModel, continues, load, plan
from .timetable import Timetable

_ROUNDING = 1e-6  # of a step: sums of floating-point times are no exact multiples of it
_NOT_RUNNING = -1


@dataclass(slots=True)
class Pace:
    """How fast a server decodes. May be changed while it runs, between two steps.

    Args:
        token_time_s: Seconds of one decode step with one sequence, above 0.
        batch_growth: By what share of that a step grows with each further sequence. 0: not at all,
            as while memory bandwidth is the limit.
        speed: Divides it; 0.5 is a server half as fast as its peers.
    """

    token_time_s: float
    batch_growth: float = 0.0
    speed: float = 1.0

    def step_s(self, sequences: int) -> float:
        """Seconds of one step with so many sequences."""
        further = sequences - 1 if sequences else 0
        return self.token_time_s * (1 + self.batch_growth * further) / self.speed


@dataclass(slots=True, eq=False)
class _Progress:
    """Where a sequence is in its plan.

    Args:
        sequence: That one.
        plan: Its whole answer.
        since: The step after which its last written token was made, or ``_NOT_RUNNING``.
        finish: The step that makes its last token, or ``_NOT_RUNNING``.
        entry: The step of its last entry among the finishes, while that is there.
    """

    sequence: Sequence
    plan: Plan
    since: int = _NOT_RUNNING
    finish: int = _NOT_RUNNING
    entry: int = _NOT_RUNNING


class TimedScheduler(Scheduler):
    """A scheduler that keeps its own time; tokens are written when somebody could see them.

    Of a sequence that is streamed (``follow``) they are written every ``event_tokens`` steps.

    Args:
        pace: How fast it decodes.
        lengths: Of new answers.
        rng: The source of all chance.
        clock: Gives the time in seconds.
        model: The first weights.
        max_num_seqs: As in the base class.
        max_model_len: As in the base class.
        event_tokens: Tokens in one event of a stream.
    """

    def __init__(
        self,
        pace: Pace,
        lengths: Lengths,
        rng: random.Random,
        clock: Callable[[], float],
        *,
        model: ScriptedModel,
        max_num_seqs: int,
        max_model_len: int,
        event_tokens: int = 1,
    ) -> None:
        super().__init__(model, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self.pace = pace
        self._lengths = lengths
        self._rng = rng
        self._clock = clock
        self._unused = np.random.default_rng(0)
        self._logprob = model.logprob
        self.looked_at = -math.inf  # when ``step`` was called last
        self._steps = 0  # decode steps so far
        self._due = math.inf  # when the next one is made
        self._progress: dict[Sequence, _Progress] = {}
        # (step of the last token, tie-breaker, progress); entries of what left early are stale
        self._finishes: list[tuple[int, int, _Progress]] = []
        self._ties = itertools.count()
        self._written = 0  # up to this step, of all that run
        self._event_tokens = event_tokens
        self._streamed: dict[Sequence, None] = {}  # of those that are streamed, the unfinished

    @property
    def next_event(self) -> float:
        """When the next sequence ends by itself, or has an event; infinite while none would."""
        if self._due == math.inf or self.state != "healthy":
            return self._due
        steps = self._steps_to_finish()
        if self._streamed:
            steps = min(steps, self._steps_to_event())
        return self._due + (steps - 1) * self._step_s()

    def _steps_to_event(self) -> int:
        written = [self._progress[s].since for s in self._streamed if s in self._progress]
        running = [since for since in written if since != _NOT_RUNNING]
        return max(1, min(running, default=2**63) + self._event_tokens - self._steps)

    def follow(self, sequence: Sequence) -> None:
        """Write the tokens of a sequence as they are due, for somebody who streams them."""
        if not sequence.finished:
            self._streamed[sequence] = None

    @property
    def running(self) -> tuple[Sequence, ...]:
        """See the base class."""
        self.step()
        return super().running

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """See the base class."""
        self.step()
        return super().waiting

    @property
    def queue_length(self) -> int:
        """How many waited when it was last looked at; unlike ``waiting``, this does not look."""
        return len(self._waiting)

    def step(self) -> int:
        """Take every decode step that is due by now, and return how many."""
        before = self._steps
        self.looked_at = now = self._clock()
        while self._due <= now + (step_s := self._step_s()) * _ROUNDING:
            if self.state == "poisoned":
                self._due = math.inf
                self.die()
            else:
                self._leap(now, step_s)
        if self._streamed and self._steps > before:
            self._write_streamed()
        return self._steps - before

    def _write_streamed(self) -> None:
        due = self._steps - self._event_tokens
        for sequence in self._streamed:
            progress = self._progress.get(sequence)
            if progress is not None and _NOT_RUNNING < progress.since <= due:
                self._write(progress)

    def _leap(self, now: float, step_s: float) -> None:
        """Take the due steps up to the first that ends a sequence."""
        due = 1 + int((now - self._due) / step_s + _ROUNDING)
        taken = min(due, self._steps_to_finish())
        self._steps += taken
        self._due += (taken - 1) * step_s  # the last step's own time
        self._finish_ended()
        self._due = self._due + self._step_s() if self.has_work else math.inf

    def _step_s(self) -> float:
        return self.pace.step_s(len(self._running))

    def _steps_to_finish(self) -> int:
        finishes = self._finishes
        while finishes[0][2].finish != finishes[0][0]:  # stale
            self._next_entry()
        return finishes[0][0] - self._steps

    def _finish_ended(self) -> None:
        finishes = self._finishes
        while finishes and finishes[0][0] <= self._steps:
            finish, progress = self._next_entry()
            if finish == progress.finish:
                self._end(progress)
        self._admit()

    def _next_entry(self) -> tuple[int, _Progress]:
        finish, _, progress = heapq.heappop(self._finishes)
        if finish == progress.entry:
            progress.entry = _NOT_RUNNING
        return finish, progress

    def _end(self, progress: _Progress) -> None:
        sequence, ended = progress.sequence, progress.plan
        self._write(progress)
        self._forget(sequence)
        self._running.remove(sequence)
        sequence.stop_reason = ended.stop_reason
        self._finish(sequence, "stop" if ended.stopped else "length")

    def _forget(self, sequence: Sequence) -> None:
        progress = self._progress.pop(sequence, None)
        if progress is not None:
            progress.finish = _NOT_RUNNING
        self._streamed.pop(sequence, None)

    def _write(self, progress: _Progress) -> None:
        """Write the tokens that a running sequence got since it was last looked at."""
        count = self._steps - progress.since
        if not count:
            return
        progress.since = self._steps
        sequence = progress.sequence
        done = sequence.output_length
        first = progress.plan.first - done
        sequence.token_ids += range(first, first - count, -1)
        sequence.logprobs += [self._logprob] * count
        sequence.ranks += [1] * count
        sequence.top_logprobs += [()] * count
        spans, start = sequence.spans, done
        if spans and spans[-1].version == self.weight_version:
            start = spans.pop().start
        spans.append(Span(self.weight_version, start, done + count))
        self.counters.generated_tokens += count
        if sequence.on_token is not None:
            sequence.on_token(sequence)

    def _write_all(self) -> None:
        """Write the tokens of all that run; what got its slot since has none that is unwritten."""
        if self._written < self._steps:  # one update labels, loads and retracts between two steps
            self._written = self._steps
            for sequence in self._running:
                self._write(self._progress[sequence])

    # --- what the base class decides, in time ------------------------------------------------

    def submit(
        self,
        request_id: str,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        on_token: Callable[[Sequence], None] | None = None,
        on_finish: Callable[[Sequence], None] | None = None,
    ) -> Sequence:
        """See the base class."""
        self.step()
        sequence = super().submit(
            request_id, token_ids, params, on_token=on_token, on_finish=on_finish
        )
        self._set_due()
        return sequence

    def abort(self, request_ids: Iterable[str] | None = None) -> int:
        """See the base class."""
        self.step()
        count = super().abort(request_ids)
        self._set_due()
        return count

    def discard(self, sequence: Sequence) -> None:
        """See the base class."""
        self.step()
        super().discard(sequence)
        self._set_due()

    def pause(self, mode: PauseMode) -> None:
        """See the base class. The step under way is lost."""
        self.step()
        super().pause(mode)
        self._set_due()

    def resume(self) -> None:
        """See the base class."""
        self.step()
        super().resume()
        self._set_due()

    def retract(self) -> None:
        """See the base class."""
        self.step()
        self._write_all()
        for sequence in self._running:
            progress = self._progress[sequence]
            progress.since = progress.finish = _NOT_RUNNING
        super().retract()
        self._set_due()

    def load_weights(self, model: Model, version: str | None = None) -> None:
        """See the base class."""
        assert isinstance(model, ScriptedModel), model
        self.step()
        self._write_all()
        super().load_weights(model, version)
        self._logprob = model.logprob

    def poison(self) -> None:
        """See the base class."""
        self.step()
        super().poison()

    def die(self) -> None:
        """See the base class."""
        self.step()
        super().die()
        self._set_due()

    def set_version(self, label: str) -> None:
        """See the base class."""
        self.step()
        self._write_all()
        super().set_version(label)

    def _set_due(self) -> None:
        if not self.has_work:
            self._due = math.inf
        elif self._due == math.inf:
            self._due = self._clock() + self._step_s()

    def _generator(self, seed: int | None) -> np.random.Generator:  # noqa: ARG002
        return self._unused  # nothing is drawn token by token, and a generator costs 20 µs

    def _enter(self, sequence: Sequence) -> None:
        progress = self._progress.get(sequence)
        if progress is None:
            progress = self._progress[sequence] = _Progress(sequence, self._plan(sequence))
        progress.since = self._steps
        progress.finish = finish = self._steps + progress.plan.length - sequence.output_length
        if progress.entry != finish:  # else its entry is there: it was out between two steps
            progress.entry = finish
            heapq.heappush(self._finishes, (finish, next(self._ties), progress))

    def _plan(self, sequence: Sequence) -> Plan:
        prompt = sequence.token_ids
        drawn = 0 if continues(prompt) else self._lengths.draw(self._rng)
        return plan(prompt, sequence.params, sequence.max_tokens, drawn)

    def _take_out(self, which: Callable[[Sequence], bool]) -> list[Sequence]:
        taken = super()._take_out(which)
        for sequence in taken:
            progress = self._progress.get(sequence)
            if progress is not None and progress.since != _NOT_RUNNING:
                self._write(progress)
            self._forget(sequence)
        return taken

    def _check(self) -> None:
        """Walk the invariants; for tests."""
        super()._check()
        running = {s for s, p in self._progress.items() if p.since != _NOT_RUNNING}
        assert running == set(self._running)
        assert all(self._progress[s].finish > self._steps for s in running)
        entries = [(finish, progress.sequence) for finish, _, progress in self._finishes]
        assert {(self._progress[s].finish, s) for s in running} <= set(entries)
        assert len(set(entries)) == len(entries)
        assert (self._due < math.inf) == self.has_work


class TimedEngine(Engine):
    """Drives a timed scheduler: wakes it when a sequence ends, and for nothing else.

    The timetable does what ``run`` does for an engine on real time; nobody calls that here.

    Args:
        scheduler: The state machine.
        load_time_s: Seconds it takes to load weights.
        timetable: Of the fleet.
        on_death: Called once broken weights have killed it, or ``die``; not from inside that.
        on_load: Called before each load; see ``Faults.on_load``.
        on_label: Gives the label that weights get in place of the one asked for.
    """

    scheduler: TimedScheduler

    def __init__(
        self,
        scheduler: TimedScheduler,
        load_time_s: float,
        timetable: Timetable,
        *,
        on_death: Callable[[], None] = lambda: None,
        on_load: Callable[[], float | None] = lambda: None,
        on_label: Callable[[str], str] = lambda asked: asked,
    ) -> None:
        super().__init__(scheduler, load)
        self._load_time_s = load_time_s
        self._on_load = on_load
        self._on_death = on_death
        self._on_label = on_label
        self._timer = timetable.timer(self._step)

    def _step(self) -> None:
        self.scheduler.step()
        if self.scheduler.state == "dead":
            self._settle()
            self.stop()
            self._on_death()
        else:
            self._changed()

    def stop(self) -> None:
        """Decode no more: another engine has taken its place."""
        self._timer.stop()

    def retime(self) -> None:
        """Find out anew when to wake, after the pace has changed."""
        self._changed()

    def _changed(self) -> None:
        dead = self.scheduler.state == "dead"
        self._timer.set(self.scheduler.looked_at if dead else self.scheduler.next_event)
        self._settle()

    async def reload(self, path: Path, version: str | None = None, *, fatal: bool) -> None:
        """See the base class."""
        share = self._on_load()
        try:
            if share:
                await self._fail_half_way(path, share)
            if share is not None:
                self.faults.failing_loads += 1
            await super().reload(path, version, fatal=fatal)
        finally:
            self._changed()  # the next event of a poisoned scheduler is its next step

    async def _fail_half_way(self, path: Path, share: float) -> None:
        """Replace a share of the weights, and fail; the engine goes on with what it has now."""
        async with self._loading:
            model = await self._read(path)
            self.scheduler.load_weights(dataclasses.replace(model, torn=share < 1))
        raise OSError(f"a worker failed after {share:.0%} of the tensors were replaced")

    def set_version(self, label: str) -> None:
        """See the base class."""
        super().set_version(self._on_label(label))

    def now(self) -> float:
        """See the base class; whoever changes the scheduler has asked the clock just now."""
        return self.scheduler.looked_at

    def unix_time(self) -> float:
        """The virtual clock's, 0 before its run: the machine's would make no two runs the same."""
        return trio.current_time() if trio.lowlevel.in_trio_run() else 0.0

    def _follow(self, generation: Generation) -> None:
        for sequence in generation.sequences:
            self.scheduler.follow(sequence)

    async def _read(self, path: Path) -> ScriptedModel:
        await trio.sleep(self._load_time_s)
        return load(path)
