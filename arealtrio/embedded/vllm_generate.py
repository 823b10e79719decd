"""Answer a generate request, in one piece or as a stream, and stop when the client goes away."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import vllm_response
from .engine import Engine, Generation
from .http import LAST_EVENT, event, send_more, until_disconnect
from .http import json_response as json_response
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
) -> tuple[Generation, Answer]:
    """Queue every answer of every prompt of a body; answers to one prompt share its id.

    Args:
        engine: Generates.
        settings: Names and limits.
        kind: Of the route.
        body: As decoded.
        header_id: The request's ``X-Request-Id``, which wins over the body's own id.

    Returns:
        What to wait for, inside its ``with`` block, and what to answer then.

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
    created = int(time.time())
    return generation, Answer(
        request_id, asked.model, created, asked, generation.sequences, settings.tell_experts
    )


def _start(engine: Engine, asked: GenerateRequest, engine_ids: list[str]) -> Generation:
    try:
        return engine.generate(
            [
                (engine_id, prompt, asked.params.numbered(number))
                for engine_id, prompt in zip(engine_ids, asked.prompts, strict=True)
                for number in range(asked.n)
            ]
        )
    except EngineDead as exc:
        raise engine_error() from exc


class EventStream(Response):
    """Server-sent events of one generation, until it ends or the client goes away.

    Starlette's own streaming response takes an async generator, whose clean-up after a cancelled
    ``send`` waits for the garbage collector; here the ``with`` block releases at once. A reader
    slower than the engine gets fewer, longer events, so nothing piles up.
    """

    def __init__(self, generation: Generation, answer: Answer, kind: Kind) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation = generation
        self._answer = answer
        self._kind = kind
        self._cursors = [Cursor(index) for index in range(len(answer.sequences))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the events; the ASGI interface."""
        with self._generation:
            async with until_disconnect(receive):
                await send({"type": "http.response.start", "status": self.status_code,
                            "headers": self.raw_headers})  # fmt: skip
                while not all(cursor.ended for cursor in self._cursors):
                    await self._generation.wait_progress()
                    await send_more(send, self._new_events())
                await send_more(send, self._last_events())
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _new_events(self) -> bytes:
        if self._generation.failed:
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
        wanted = self._answer.request.include_usage and not self._generation.failed
        return (event(self._kind.usage(self._answer)) if wanted else b"") + LAST_EVENT


async def whole_answer(
    request: Request, generation: Generation, answer: Answer, kind: Kind
) -> Response:
    """Wait for the end and answer in one piece; the sequences go if the client goes."""
    with generation:
        async with until_disconnect(request.receive):
            await generation.wait_finished()
    if generation.failed:
        raise engine_error()
    return json_response(kind.whole(answer))
