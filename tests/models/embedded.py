"""The embedded scheduler as a list and a loop, and a model whose next token anyone can work out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

VOCAB_SIZE = 7
EOS_ID = 0


class CountingModel:
    """After a sequence that sums to s comes (s + offset) mod 7, certain as far as logits allow.

    Other weights are another offset.
    """

    vocab_size = VOCAB_SIZE
    eos_id = EOS_ID

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def next_logits(self, sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        logits = np.zeros((len(sequences), VOCAB_SIZE), dtype=np.float32)
        for row, sequence in enumerate(sequences):
            logits[row, (sum(sequence) + self.offset) % VOCAB_SIZE] = 50
        return logits


@dataclass(eq=False)
class PlainSequence:
    """One sequence: `versions` has a label for each token, where the real one has spans."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]
    running: bool = False
    output: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    reason: str | None = None


class PlainScheduler:
    """Everything alive in one list, in the order it came; a slot is a flag."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.alive: list[PlainSequence] = []
        self.mode: str | None = None
        self.offset = 0
        self.version = "0"
        self.poisoned = False
        self.dead = False
        self.tokens = 0

    @property
    def running(self) -> list[PlainSequence]:
        return [sequence for sequence in self.alive if sequence.running]

    @property
    def waiting(self) -> list[PlainSequence]:
        return [sequence for sequence in self.alive if not sequence.running]

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int, stop: frozenset[int]
    ) -> PlainSequence:
        room = self.max_model_len - len(prompt)
        sequence = PlainSequence(request_id, prompt, min(room, max_tokens), stop)
        self.alive.append(sequence)
        self.admit()
        return sequence

    def admit(self) -> None:
        for sequence in self.alive:
            if self.mode is None and len(self.running) < self.max_num_seqs:
                sequence.running = True

    def step(self) -> int:
        if not self.running or self.mode not in (None, "wait"):
            return 0
        if self.poisoned:
            self.dead = True
            for sequence in list(self.alive):
                self.end(sequence, "error")
            return 0
        batch = self.running
        for sequence in batch:
            self.decode(sequence)
        self.admit()
        return len(batch)

    def decode(self, sequence: PlainSequence) -> None:
        token = (sum(sequence.prompt) + sum(sequence.output) + self.offset) % VOCAB_SIZE
        sequence.output.append(token)
        sequence.versions.append(self.version)
        self.tokens += 1
        if token == EOS_ID or token in sequence.stop_token_ids:
            self.end(sequence, "stop")
        elif len(sequence.output) == sequence.max_tokens:
            self.end(sequence, "length")

    def end(self, sequence: PlainSequence, reason: str | None) -> None:
        sequence.reason = reason
        self.alive.remove(sequence)

    def abort(self, ids: set[str] | None) -> int:
        gone = [s for s in self.alive if ids is None or s.request_id in ids]
        for sequence in gone:
            self.end(sequence, "abort")
        self.admit()
        return len(gone)

    def discard(self, sequence: PlainSequence) -> None:
        if sequence in self.alive:
            self.end(sequence, None)
        self.admit()

    def pause(self, mode: str) -> None:
        self.mode = mode
        if mode == "abort":
            self.abort(None)
        if mode == "retract":
            for sequence in self.alive:
                sequence.running = False

    def resume(self) -> None:
        self.mode = None
        self.admit()
