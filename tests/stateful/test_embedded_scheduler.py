"""The embedded server's scheduler against a list and a loop, over any history."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from arealtrio.embedded.sampling import SamplingParams
from arealtrio.embedded.scheduler import EngineDead, Scheduler
from arealtrio.embedded.sequence import Sequence
from arealtrio.errors import InvalidRequest
from arealtrio.types import PauseMode

from ..models.embedded import VOCAB_SIZE, CountingModel, PlainScheduler, PlainSequence

MAX_MODEL_LEN = 12
ids = st.sampled_from(["a", "b", "c", "d"])
tokens = st.integers(0, VOCAB_SIZE - 1)
prompts = st.lists(tokens, min_size=1, max_size=MAX_MODEL_LEN - 1)
modes = st.sampled_from(["abort", "keep", "wait", "retract", "in_place"])


def versions_of(sequence: Sequence) -> list[str]:
    """Spread the spans out; on the way, see that they are in order and without a hole."""
    spread: list[str] = []
    for span in sequence.spans:
        assert span.start == len(spread) < span.end
        spread += [span.version] * (span.end - span.start)
    assert spread == sorted(spread, key=int)
    return spread


class SchedulerMachine(RuleBasedStateMachine):
    pairs = Bundle("pairs")

    @initialize(slots=st.integers(1, 3))
    def start(self, slots: int) -> None:
        self.real = Scheduler(
            CountingModel(),
            max_num_seqs=slots,
            max_model_len=MAX_MODEL_LEN,
            weight_version="0",
        )
        self.model = PlainScheduler(slots, MAX_MODEL_LEN)
        self.pairs_seen: list[tuple[Sequence, PlainSequence]] = []
        self.finishes: dict[int, int] = {}
        self.tokens: dict[int, int] = {}

    @precondition(lambda self: not self.model.dead)
    @rule(
        target=pairs,
        request_id=ids,
        prompt=prompts,
        max_tokens=st.integers(1, 8),
        stop=st.frozensets(tokens, max_size=1),
    )
    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int, stop: frozenset[int]
    ) -> tuple[Sequence, PlainSequence]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=stop)
        real = self.real.submit(
            request_id, prompt, params, on_token=self.saw_token, on_finish=self.saw_finish
        )
        pair = (real, self.model.submit(request_id, prompt, max_tokens, stop))
        self.pairs_seen.append(pair)
        return pair

    def saw_token(self, sequence: Sequence) -> None:
        self.tokens[id(sequence)] = self.tokens.get(id(sequence), 0) + 1

    def saw_finish(self, sequence: Sequence) -> None:
        assert sequence.finished
        self.finishes[id(sequence)] = self.finishes.get(id(sequence), 0) + 1

    @rule()
    def step(self) -> None:
        paused = self.real.pause_mode not in (None, "wait")
        before = self.real.counters.generated_tokens
        assert self.real.step() == self.model.step()
        assert not paused or self.real.counters.generated_tokens == before

    @rule(wanted=st.none() | st.sets(ids, max_size=2))
    def abort(self, wanted: set[str] | None) -> None:
        assert self.real.abort(wanted) == self.model.abort(wanted)

    @rule(pair=pairs)
    def discard(self, pair: tuple[Sequence, PlainSequence]) -> None:
        self.real.discard(pair[0])
        self.model.discard(pair[1])

    @rule(mode=modes)
    def pause(self, mode: PauseMode) -> None:
        self.real.pause(mode)
        self.model.pause(mode)

    @rule()
    def resume(self) -> None:
        self.real.resume()
        self.model.resume()

    @precondition(lambda self: not self.model.dead)
    @rule(offset=st.integers(0, VOCAB_SIZE - 1), label_it=st.booleans())
    def load(self, offset: int, label_it: bool) -> None:
        version = str(int(self.model.version) + 1) if label_it else None
        self.real.load_weights(CountingModel(offset), version)
        self.model.offset, self.model.poisoned = offset, False
        self.model.version = version or self.model.version

    @rule(often=st.integers(0, 4))
    def fail_to_load(self, often: int) -> None:
        if often == 0:  # seldom: nothing happens after a death
            self.real.poison()
            self.model.poisoned = not self.model.dead

    @rule(prompt=st.sampled_from([[], [VOCAB_SIZE], [-1], [1] * MAX_MODEL_LEN]))
    def submit_nonsense(self, prompt: list[int]) -> None:
        with pytest.raises((InvalidRequest, EngineDead)):
            self.real.submit("a", prompt, SamplingParams())

    @precondition(lambda self: self.model.dead)
    @rule()
    def the_dead_take_nothing(self) -> None:
        with pytest.raises(EngineDead):
            self.real.submit("a", [1], SamplingParams())
        with pytest.raises(EngineDead):
            self.real.load_weights(CountingModel())

    @invariant()
    def same_queues(self) -> None:
        self.real._check()
        assert [s.request_id for s in self.real.running] == [
            s.request_id for s in self.model.running
        ]
        assert [s.request_id for s in self.real.waiting] == [
            s.request_id for s in self.model.waiting
        ]

    @invariant()
    def same_answers(self) -> None:
        for real, plain in self.pairs_seen:
            assert real.output_ids == plain.output
            assert versions_of(real) == plain.versions
            assert real.finish_reason == plain.reason
            assert len(real.logprobs) == len(real.ranks) == len(real.top_logprobs)
            assert self.tokens.get(id(real), 0) == len(plain.output)
            assert self.finishes.get(id(real), 0) == (plain.reason is not None)

    @invariant()
    def same_counts(self) -> None:
        counters = self.real.counters
        assert counters.submitted == len(self.pairs_seen)
        assert counters.generated_tokens == self.model.tokens
        for reason, count in counters.finished.items():
            assert count == sum(plain.reason == reason for _, plain in self.pairs_seen)
        expected = "dead" if self.model.dead else "poisoned" if self.model.poisoned else "healthy"
        assert self.real.state == expected


TestScheduler = SchedulerMachine.TestCase
