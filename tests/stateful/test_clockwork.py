"""The scheduler in continuous time against one that makes every token when it is due."""

from __future__ import annotations

import math
import random
from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arealtrio.embedded.sampling import SamplingParams
from arealtrio.embedded.scheduler import EngineDead
from arealtrio.embedded.sequence import Sequence
from arealtrio.testing import EOS, RecordedLengths, ScriptedModel
from arealtrio.testing.clockwork import Pace, TimedScheduler
from arealtrio.types import PauseMode

from ..models.clockwork import TokenByToken

MODES: tuple[PauseMode, ...] = ("keep", "abort", "wait", "retract", "in_place")


def seen(sequence: Sequence) -> tuple[object, ...]:
    """All that an answer shows."""
    return (
        sequence.request_id, sequence.token_ids, sequence.logprobs, sequence.spans,
        sequence.ranks, sequence.top_logprobs, sequence.finish_reason, sequence.stop_reason,
    )  # fmt: skip


def ids(sequences: tuple[Sequence, ...]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


class ClockworkMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 3),
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
        growth=st.sampled_from([0.0, 0.5]),
    )
    def start(self, slots: int, lengths: list[int], growth: float) -> None:
        self.now = 0.0
        self.due = math.inf  # of the model's next step
        self.pace = Pace(1.0, batch_growth=growth)
        self.real = TimedScheduler(
            self.pace,
            RecordedLengths(lengths),
            random.Random(0),
            lambda: self.now,
            model=ScriptedModel(0),
            max_num_seqs=slots,
            max_model_len=1000,
        )
        self.model = TokenByToken(RecordedLengths(lengths), slots)
        self.pairs: list[tuple[Sequence, Sequence]] = []
        self.finished: list[list[str]] = [[], []]  # of each, in order

    @staticmethod
    def note(finished: list[str], sequence: Sequence) -> None:
        finished.append(sequence.request_id)

    def step_s(self) -> float:
        return self.pace.step_s(len(self.model.running))

    def set_due(self) -> None:
        if not self.model.has_work:
            self.due = math.inf
        elif self.due == math.inf:
            self.due = self.now + self.step_s()

    @rule(quarters=st.integers(1, 30))
    def pass_time(self, quarters: int) -> None:
        until = self.now + quarters / 4
        while self.due <= until:
            self.model.step()
            self.due = self.due + self.step_s() if self.model.has_work else math.inf
        self.now = until

    @rule(
        prompt=st.sampled_from([(1, 2), (5,), (3, EOS + 4), (3, EOS)]),
        max_tokens=st.sampled_from([1, 5, 900]),
        min_tokens=st.sampled_from([0, 1]),
        ignore_eos=st.booleans(),
        stop=st.sampled_from([frozenset(), frozenset({EOS + 2})]),
    )
    def submit(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        stop: frozenset[int],
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos and max_tokens < 900,
            stop_token_ids=stop,
        )
        name = f"r{len(self.pairs)}"
        made: list[Sequence | None] = []
        for scheduler, finished in zip((self.real, self.model), self.finished, strict=True):
            try:
                note = partial(self.note, finished)
                made.append(scheduler.submit(name, prompt, params, on_finish=note))
            except EngineDead:
                made.append(None)
        real, model = made
        assert (real is None) == (model is None)
        if real is not None and model is not None:
            self.pairs.append((real, model))
        self.set_due()

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), everything=st.booleans())
    def abort(self, data: st.DataObject, everything: bool) -> None:
        names = [real.request_id for real, _ in self.pairs]
        wanted = None if everything else [data.draw(st.sampled_from(names))]
        assert self.real.abort(wanted) == self.model.abort(wanted)
        self.set_due()

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        real, model = data.draw(st.sampled_from(self.pairs))
        self.real.discard(real)
        self.model.discard(model)
        self.set_due()

    @rule(mode=st.sampled_from(MODES))
    def pause(self, mode: PauseMode) -> None:
        self.real.pause(mode)
        self.model.pause(mode)
        self.set_due()

    @rule()
    def resume(self) -> None:
        self.real.resume()
        self.model.resume()
        self.set_due()

    @rule()
    def retract(self) -> None:
        self.real.retract()
        self.model.retract()
        self.set_due()

    @rule(version=st.integers(1, 5), label=st.booleans())
    def load(self, version: int, label: bool) -> None:
        for scheduler in (self.real, self.model):
            try:
                scheduler.load_weights(ScriptedModel(version), str(version) if label else None)
            except EngineDead:
                assert self.model.state == "dead"

    @rule(version=st.integers(1, 5))
    def relabel(self, version: int) -> None:
        self.real.set_version(str(version))
        self.model.set_version(str(version))

    @precondition(lambda self: self.now > 20)  # early, little else would be tried
    @rule()
    def poison(self) -> None:
        self.real.poison()
        self.model.poison()

    @precondition(lambda self: self.now > 40)
    @rule()
    def die(self) -> None:
        self.real.die()
        self.model.die()
        self.set_due()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "real"):
            return
        assert ids(self.real.running) == ids(self.model.running)
        assert ids(self.real.waiting) == ids(self.model.waiting)
        assert self.real.state == self.model.state
        assert self.finished[0] == self.finished[1]
        for real, model in self.pairs:
            if model.finished:
                assert seen(real) == seen(model)
        self.real._check()

    def teardown(self) -> None:
        """What was under way shows its tokens once it is aborted."""
        if not hasattr(self, "real"):
            return
        self.real.abort()
        self.model.abort()
        assert [seen(real) for real, _ in self.pairs] == [seen(model) for _, model in self.pairs]
        assert self.real.counters == self.model.counters


TestClockwork = ClockworkMachine.TestCase
