"""Continuous batching as a state machine: no clock, no I/O, no event loop.

Whoever drives it calls ``step()`` for one decode step of every running sequence. The driver decides
when (a server by the clock, a simulation by a virtual one); everything else is decided here, so all
faces of the embedded server, in memory or over HTTP, in either dialect, behave alike.

Invariants, checked by ``_check``: at most ``max_num_seqs`` run; a sequence waits only while no slot
is free or admission is closed; the queue is first in, first out; every sequence submitted finishes
exactly once or is discarded by its owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np

from ..errors import ConfigError, InvalidRequest, UsageError
from ..types import PauseMode
from .sampling import Logits, LogprobsMode, SamplingParams, draw, log_softmax
from .sequence import FinishReason, Sequence

EngineState: TypeAlias = Literal["healthy", "poisoned", "dead"]


class Model(Protocol):
    """What the scheduler needs of a model."""

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0 … V − 1."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""

    def next_logits(self, sequences: SequenceOf[SequenceOf[int]], /) -> Logits:
        """Return float[B, vocab_size], the logits of each sequence's next token."""


class EngineDead(UsageError):
    """The engine died, of broken weights or of a request, and serves nothing any more."""


@dataclass(slots=True)
class Counters:
    """What happened since the start; each only grows.

    Args:
        submitted: Sequences accepted by ``submit``.
        prompt_tokens: Prompt tokens of the sequences that got a slot.
        generated_tokens: Tokens sampled.
        preemptions: Running sequences put back into the queue (``retract``).
        finished: Sequences that finished, by reason. A discarded one is in none.
    """

    submitted: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )


class Scheduler:
    """The inference engine of the embedded server.

    Args:
        model: Gives the logits; replaced by ``load_weights``.
        max_num_seqs: Sequences that run at once, ≥ 1; the rest wait in the order they came.
        max_model_len: Prompt and answer together at most, in tokens, ≥ 2.
        logprobs_mode: Which distribution the reported logprobs are of; see ``sampling.draw``.
        seed: Sequences without a seed of their own derive theirs from it and their number.
        weight_version: The label of the first weights.

    Raises:
        ConfigError: A limit is out of its range.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_num_seqs: int = 8,
        max_model_len: int = 2048,
        logprobs_mode: LogprobsMode = "raw_logprobs",
        seed: int = 0,
        weight_version: str = "default",
    ) -> None:
        if max_num_seqs < 1 or max_model_len < 2:
            raise ConfigError("max_num_seqs must be at least 1 and max_model_len at least 2")
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.logprobs_mode: LogprobsMode = logprobs_mode
        self.weight_version = weight_version
        self.counters = Counters()
        self._model = model
        self._seed = seed
        self._running: list[Sequence] = []  # in the order they got their slots
        self._waiting: deque[Sequence] = deque()
        self._pause_mode: PauseMode | None = None
        self._state: EngineState = "healthy"

    @property
    def model(self) -> Model:
        """The weights in service."""
        return self._model

    @property
    def state(self) -> EngineState:
        """``poisoned`` after a failed load, until a good one; ``dead`` is for ever."""
        return self._state

    @property
    def pause_mode(self) -> PauseMode | None:
        """How it was paused; None while it is not."""
        return self._pause_mode

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold a slot, oldest slot first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences without a slot, next one first."""
        return tuple(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything now."""
        return bool(self._running) and self._pause_mode in (None, "wait")

    def submit(
        self,
        request_id: str,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        on_token: Callable[[Sequence], None] | None = None,
        on_finish: Callable[[Sequence], None] | None = None,
    ) -> Sequence:
        """Queue one sequence; it takes a slot at once if one is free and nothing is paused.

        ``params.max_tokens`` is cut to what the model's length leaves, as vLLM does.

        Raises:
            EngineDead: No sequence can be served any more.
            InvalidRequest: The prompt is empty, too long, or holds an id outside the vocabulary.
        """
        if self._state == "dead":
            raise EngineDead("this engine died; start another server")
        self._check_prompt(token_ids)
        room = self.max_model_len - len(token_ids)
        sequence = Sequence(
            request_id,
            token_ids,
            params,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            rng=self._generator(params.seed),
            on_token=on_token,
            on_finish=on_finish,
        )
        self.counters.submitted += 1
        self._waiting.append(sequence)
        self._admit()
        return sequence

    def step(self) -> int:
        """Decode one token of every running sequence.

        Returns:
            How many sequences advanced; 0 when nothing runs or it is paused.
        """
        if not self.has_work:
            return 0
        if self._state == "poisoned":
            self._die()
            return 0
        batch = list(self._running)
        logits = self._model.next_logits([sequence.token_ids for sequence in batch])
        for sequence, row, logprobs in zip(batch, logits, log_softmax(logits), strict=True):
            self._advance(sequence, row, logprobs)
        self._running = [sequence for sequence in self._running if not sequence.finished]
        self._admit()
        return len(batch)

    def abort(self, request_ids: Iterable[str] | None = None) -> int:
        """Finish sequences now with reason ``abort`` and the output they have.

        Args:
            request_ids: Whose; unknown ids are no error. None: everything, running and waiting.

        Returns:
            How many sequences were aborted.
        """
        wanted = None if request_ids is None else frozenset(request_ids)
        return self._finish_all(
            "abort", lambda sequence: wanted is None or sequence.request_id in wanted
        )

    def discard(self, sequence: Sequence) -> None:
        """Drop a sequence whose owner is gone: no hook is called, no reason counted.

        Harmless if it has finished or was discarded before.
        """
        if not sequence.finished:
            self._take_out(lambda candidate: candidate is sequence)
            sequence.unhook()
            self._admit()

    def pause(self, mode: PauseMode) -> None:
        """Stop. New sequences are taken but wait until ``resume``. Pausing again changes the mode.

        Args:
            mode: ``abort`` finishes everything with what it has; ``keep`` and ``in_place`` freeze
                the running where they are; ``wait`` lets the running finish; ``retract`` puts the
                running back at the head of the queue, in order, with the tokens they have.
        """
        self._pause_mode = mode
        if mode == "abort":
            self.abort()
        elif mode == "retract":
            self.retract()

    def resume(self) -> None:
        """Go on; harmless when not paused."""
        self._pause_mode = None
        self._admit()

    def retract(self) -> None:
        """Put the running back at the head of the queue, in order, with the tokens they have."""
        self.counters.preemptions += len(self._running)
        for sequence in self._running:
            sequence.retractions += 1
        self._waiting.extendleft(reversed(self._running))
        self._running = []
        self._admit()

    def load_weights(self, model: Model, version: str | None = None) -> None:
        """Put new weights in service between two tokens; what runs goes on with them.

        Args:
            model: Of the same vocabulary.
            version: Its label; None leaves the label, as vLLM's ``reload_weights`` does.

        Raises:
            ConfigError: The vocabularies differ; nothing was changed.
            EngineDead: It is too late.
        """
        if self._state == "dead":
            raise EngineDead("this engine died; start another server")
        if model.vocab_size != self._model.vocab_size:
            raise ConfigError(
                f"weights of {model.vocab_size} tokens cannot replace weights of "
                f"{self._model.vocab_size}"
            )
        self._model = model
        self._state = "healthy"
        if version is not None:
            self.set_version(version)

    def poison(self) -> None:
        """Remember a failed load the way vLLM does: the next decode step kills the engine.

        A good ``load_weights`` before that step heals it. An engine that survives failed loads
        (SGLang's) never calls this: the old weights then simply stay in service.
        """
        if self._state == "healthy":
            self._state = "poisoned"

    def die(self) -> None:
        """Serve nothing any more: everything in flight ends with reason ``error``."""
        self._die()

    def set_version(self, label: str) -> None:
        """Label the weights in service; tokens from here on carry it."""
        self.weight_version = label

    def _check_prompt(self, token_ids: SequenceOf[int]) -> None:
        if not token_ids:
            raise InvalidRequest("the prompt is empty")
        if len(token_ids) >= self.max_model_len:
            raise InvalidRequest(
                f"a prompt of {len(token_ids)} tokens leaves no room for an answer "
                f"within {self.max_model_len}"
            )
        if min(token_ids) < 0 or max(token_ids) >= self._model.vocab_size:
            raise InvalidRequest(f"a token id is outside 0 … {self._model.vocab_size - 1}")

    def _generator(self, seed: int | None) -> np.random.Generator:
        if seed is not None:
            return np.random.default_rng(abs(seed))
        return np.random.default_rng([abs(self._seed), self.counters.submitted])

    def _admit(self) -> None:
        """Fill free slots from the head of the queue, after every change that may free one."""
        if self._pause_mode is not None:
            return
        while self._waiting and len(self._running) < self.max_num_seqs:
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            if not sequence.output_length:
                self.counters.prompt_tokens += sequence.prompt_length
            self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        """A sequence got a slot, maybe once more. A subclass that keeps time plans its answer."""

    def _advance(self, sequence: Sequence, row: Logits, logprobs: np.ndarray) -> None:
        params = sequence.params
        drawn = draw(
            row,
            logprobs,
            params,
            sequence.rng,
            prompt=sequence.prompt_ids if params.penalised else (),
            output=sequence.output_ids if params.penalised else (),
            forbidden=self._forbidden(sequence),
            mode=self.logprobs_mode,
        )
        sequence.append(drawn, self.weight_version)
        self.counters.generated_tokens += 1
        reason = self._reason_to_end(sequence, drawn.token_id)
        if sequence.on_token is not None:
            sequence.on_token(sequence)
        if reason is not None:
            self._finish(sequence, reason)

    def _forbidden(self, sequence: Sequence) -> list[int]:
        params = sequence.params
        if sequence.output_length >= params.min_tokens:
            return []
        return [*params.stop_token_ids, *([] if params.ignore_eos else [self._model.eos_id])]

    def _reason_to_end(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id == self._model.eos_id and not sequence.params.ignore_eos:
            return "stop"
        if token_id in sequence.params.stop_token_ids:
            sequence.stop_reason = token_id
            return "stop"
        return "length" if sequence.output_length >= sequence.max_tokens else None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.counters.finished[reason] += 1
        if sequence.on_finish is not None:
            sequence.on_finish(sequence)
        sequence.unhook()

    def _finish_all(self, reason: FinishReason, which: Callable[[Sequence], bool]) -> int:
        taken = self._take_out(which)
        for sequence in taken:
            self._finish(sequence, reason)
        self._admit()
        return len(taken)

    def _take_out(self, which: Callable[[Sequence], bool]) -> list[Sequence]:
        taken = [sequence for sequence in (*self._running, *self._waiting) if which(sequence)]
        if taken:
            gone = {id(sequence) for sequence in taken}
            self._running = [s for s in self._running if id(s) not in gone]
            self._waiting = deque(s for s in self._waiting if id(s) not in gone)
        return taken

    def _die(self) -> None:
        self._state = "dead"
        self._finish_all("error", lambda _: True)

    def _check(self) -> None:
        """Walk the invariants; for tests."""
        everything = [*self._running, *self._waiting]
        assert len(self._running) <= self.max_num_seqs
        assert len({id(sequence) for sequence in everything}) == len(everything)
        assert not any(sequence.finished for sequence in everything)
        if self._waiting and self._pause_mode is None:
            assert len(self._running) == self.max_num_seqs
