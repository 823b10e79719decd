"""Answer ``/generate``, in one piece or as a stream; nothing here knows of HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import trio

from .engine import Generation
from .http import LAST_EVENT, event
from .sglang_error import Json, SglangError, engine_died
from .sglang_frontend import Frontend
from .sglang_request import GenerateBody, GenerateRequest, Item, read_generate
from .sglang_response import Told


class Reply:
    """One request for tokens; see ``http.Reply``. It waits at the gate before it is looked at.

    What is wrong with a request is found behind the gate, so a stream that is refused has begun
    with a 200 and says so in its only event.

    Args:
        front: The front end.
        body: What was asked.
    """

    def __init__(self, front: Frontend, body: GenerateBody) -> None:
        self.streamed = body.stream
        self.generation: Generation | None = None
        self._front = front
        self._body = body
        self._received_ts = front.engine.unix_time()
        self._received = trio.current_time()
        self._rids: list[str] = []  # by which it is known
        self._inside = False  # the gate
        self._asked: GenerateRequest | None = None
        self._refused: SglangError | None = None
        self._sent: list[int | None] = []  # tokens of each; None: told how it ended
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """See ``http.Reply``."""
        if self.generation is not None:
            self.generation.release()
        if self._inside:
            self._inside = False
            self._front.gate.leave()
        self._front.forget(self._rids)
        self._rids = []

    def start(self) -> bool:
        """See ``http.Reply``."""
        try:
            self._know()
            if not self._front.gate.try_to_enter():
                return False
            self._begin()
        except SglangError as exc:
            self._refuse(exc)
        return True

    async def wait(self) -> None:
        """See ``http.Reply``."""
        generation = await self._started()
        if generation is not None:
            await generation.wait_finished()

    def answer(self) -> Json | list[Json]:
        """See ``http.Reply``."""
        if self._refused is not None:
            raise self._refused
        assert self._asked is not None
        if self.generation is None or self.generation.failed:
            raise engine_died()
        answers = [self._told(index, item).answer() for index, item in self._items()]
        return answers if self._asked.batch else answers[0]

    async def next_events(self) -> bytes:
        """See ``http.Reply``."""
        generation = await self._started()
        while generation is not None and any(one is not None for one in self._sent):
            await generation.wait_progress()
            if generation.failed:
                self._refuse(engine_died())
                break
            if news := b"".join(self._news()):
                return news
        return self._last_events()

    def _last_events(self) -> bytes:
        if self._over:
            return b""
        self._over = True
        refused = b"" if self._refused is None else event(self._refused.event())
        return refused + LAST_EVENT

    async def _started(self) -> Generation | None:
        """Its sequences, once it is through the gate; None if it is refused."""
        if self.generation is None and self._refused is None and not self.start():
            await self._front.gate.enter()
            try:
                self._begin()
            except SglangError as exc:
                self._refuse(exc)
        return self.generation

    def _know(self) -> None:
        if self._asked is None:
            self._asked = read_generate(self._body)
            self._sent = [0] * len(self._asked.items)
            self._rids = self._front.know(self._asked.items)

    def _begin(self) -> None:
        """Queue it, inside the gate."""
        assert self._asked is not None
        self._inside = True
        self.generation = self._front.begin(self._asked.items, streamed=self.streamed)

    def _refuse(self, error: SglangError) -> None:
        self._refused = error
        self._sent = []
        self.release()

    def _items(self) -> Iterator[tuple[int, Item]]:
        assert self._asked is not None
        return enumerate(self._asked.items)

    def _told(self, index: int, item: Item) -> Told:
        assert self.generation is not None
        sequence = self.generation.sequences[index]
        first = self.generation.first_token_at.get(sequence)
        end = self.generation.finished_at.get(sequence)
        return Told(
            sequence=sequence,
            label=self._front.label,
            logprobs=item.logprobs,
            experts_from=item.experts_from if self._front.settings.tell_experts else None,
            received_ts=self._received_ts,
            first_token_s=None if first is None else first - self._received,
            end_s=None if end is None else end - self._received,
        )

    def _news(self) -> Iterator[bytes]:
        assert self.generation is not None
        assert self._asked is not None
        incremental = self._front.settings.incremental_streaming_output
        for index, item in self._items():
            sequence, start = self.generation.sequences[index], self._sent[index]
            if start is None or not (sequence.finished or sequence.output_length > start):
                continue
            chunk = self._told(index, item).answer(start if incremental else 0)
            self._sent[index] = None if sequence.finished else sequence.output_length
            yield event({**chunk, "index": index} if self._asked.batch else chunk)
