"""The scheduler of the embedded server making scripted answers, one token at a time."""

from __future__ import annotations

import random

from arealtrio.embedded.sampling import Drawn
from arealtrio.embedded.scheduler import Scheduler
from arealtrio.embedded.sequence import Sequence
from arealtrio.testing import Lengths, ScriptedModel
from arealtrio.testing.script import Plan, continues, plan


class TokenByToken(Scheduler):
    def __init__(self, lengths: Lengths, max_num_seqs: int) -> None:
        super().__init__(ScriptedModel(0), max_num_seqs=max_num_seqs, max_model_len=1000)
        self.lengths = lengths
        self.plans: dict[Sequence, Plan] = {}

    def step(self) -> int:
        if self.state == "poisoned":
            self.die()
            return 0
        model = self.model
        assert isinstance(model, ScriptedModel)
        for sequence in (batch := list(self._running)):
            script, made = self.plans[sequence], sequence.output_length
            sequence.append(Drawn(script.first - made, model.logprob, 1, ()), self.weight_version)
            self.counters.generated_tokens += 1
            if made + 1 == script.length:
                sequence.stop_reason = script.stop_reason
                self._finish(sequence, "stop" if script.stopped else "length")
        self._running = [sequence for sequence in self._running if not sequence.finished]
        self._admit()
        return len(batch)

    def _admit(self) -> None:
        before = len(self._running)
        super()._admit()
        for sequence in self._running[before:]:
            if sequence not in self.plans:
                prompt = sequence.token_ids
                drawn = 0 if continues(prompt) else self.lengths.draw(random.Random(0))
                self.plans[sequence] = plan(prompt, sequence.params, sequence.max_tokens, drawn)
