"""Answer a generate request, in one piece or as a stream; nothing here knows of HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from . import vllm_response
from .engine import Engine, Generation
from .http import LAST_EVENT, event
from .scheduler import EngineDead
from .settings import ServerSettings
from .vllm_error import engine_error
from .vllm_fields import Body
from .vllm_request import GenerateRequest, Limits, read_chat, read_completion, read_tokens
from .vllm_response import Answer, Cursor, Json


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the two generate routes.

    Args:
        prefix: Before the client's id in the id the answer carries.
        numbered: Whether an engine id ends in the number of its prompt.
        read: Makes a request of a body.
        whole: The answer that is no stream.
        chunk: One event of a stream.
        usage: The last event of a stream that asked for it.
    """

    prefix: str
    numbered: bool
    read: Callable[[Body, Limits], GenerateRequest]
    whole: Callable[[Answer], Json]
    chunk: Callable[[Answer, Cursor], Json]
    usage: Callable[[Answer], Json]

    def engine_ids(self, request_id: str, prompts: int) -> list[str]:
        """The ids that abort names, one for each prompt."""
        return [f"{request_id}-{i}" if self.numbered else request_id for i in range(prompts)]


COMPLETION = Kind(
    prefix="cmpl-",
    numbered=True,
    read=read_completion,
    whole=vllm_response.completion,
    chunk=vllm_response.completion_chunk,
    usage=vllm_response.completion_usage_chunk,
)
CHAT = Kind(
    prefix="chatcmpl-",
    numbered=False,
    read=read_chat,
    whole=vllm_response.chat,
    chunk=vllm_response.tokens_chunk,  # not used: it does not stream
    usage=vllm_response.tokens_usage_chunk,
)
TOKENS = Kind(
    prefix="generate-tokens-",
    numbered=False,
    read=read_tokens,
    whole=vllm_response.tokens,
    chunk=vllm_response.tokens_chunk,
    usage=vllm_response.tokens_usage_chunk,
)


def begin(
    engine: Engine, settings: ServerSettings, kind: Kind, body: Body, header_id: str | None
) -> Reply:
    """Queue every answer of every prompt of a body; answers to one prompt share its id.

    Args:
        engine: Generates.
        settings: Names and limits.
        kind: Of the route.
        body: As decoded.
        header_id: The request's ``X-Request-Id``, which wins over the body's own id.

    Returns:
        What answers it; leave its ``with`` block when that is done.

    Raises:
        VllmError: As vLLM would answer; nothing is queued.
    """
    model = engine.scheduler.model
    limits = Limits(
        settings.served_model_name, model.vocab_size, settings.max_model_len, engine.adapters
    )
    asked = kind.read(body, limits)
    request_id = kind.prefix + (header_id or asked.request_id or secrets.token_hex(8))
    generation = _start(engine, asked, kind.engine_ids(request_id, len(asked.prompts)))
    created = int(engine.unix_time())
    answer = Answer(
        request_id, asked.model, created, asked, generation.sequences, settings.tell_experts
    )
    return Reply(generation, answer, kind)


def _start(engine: Engine, asked: GenerateRequest, engine_ids: list[str]) -> Generation:
    try:
        return engine.generate(
            [
                (engine_id, prompt, asked.params.numbered(number))
                for engine_id, prompt in zip(engine_ids, asked.prompts, strict=True)
                for number in range(asked.n)
            ],
            streamed=asked.stream,
        )
    except EngineDead as exc:
        raise engine_error() from exc


class Reply:
    """One request for tokens; see ``http.Reply``. Its sequences are in the scheduler already.

    Args:
        generation: Its sequences.
        answer: What it will say.
        kind: Of the route.
    """

    def __init__(self, generation: Generation, answer: Answer, kind: Kind) -> None:
        self.generation = generation
        self._answer = answer
        self._kind = kind
        self._cursors: list[Cursor] = []
        if answer.request.stream:
            self._cursors = [Cursor(index) for index in range(len(answer.sequences))]
        self._over = False

    @property
    def streamed(self) -> bool:
        """See ``http.Reply``."""
        return self._answer.request.stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """See ``http.Reply``."""
        self.generation.release()

    def start(self) -> bool:
        """See ``http.Reply``."""
        return True

    async def wait(self) -> None:
        """See ``http.Reply``."""
        await self.generation.wait_finished()

    def answer(self) -> Json:
        """See ``http.Reply``."""
        if self.generation.failed:
            raise engine_error()
        return self._kind.whole(self._answer)

    async def next_events(self) -> bytes:
        """See ``http.Reply``."""
        while not all(cursor.ended for cursor in self._cursors):
            await self.generation.wait_progress()
            if events := self._new_events():
                return events
        if self._over:
            return b""
        self._over = True
        return self._last_events()

    def _new_events(self) -> bytes:
        if self.generation.failed:
            for cursor in self._cursors:
                cursor.ended = True
            return event(engine_error().body)
        return b"".join(
            event(self._kind.chunk(self._answer, cursor))
            for cursor in self._cursors
            if not cursor.ended and self._has_news(cursor)
        )

    def _has_news(self, cursor: Cursor) -> bool:
        sequence = self._answer.sequences[cursor.index]
        return sequence.finished or sequence.output_length > cursor.sent

    def _last_events(self) -> bytes:
        wanted = self._answer.request.include_usage and not self.generation.failed
        return (event(self._kind.usage(self._answer)) if wanted else b"") + LAST_EVENT
