"""Answer ``/generate``, in one piece or as a stream, and stop when the client goes away."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .engine import Generation
from .http import LAST_EVENT, event, json_response, send_more, until_disconnect
from .sglang_error import Json, SglangError, engine_died
from .sglang_frontend import Frontend
from .sglang_request import GenerateBody, Item, read_generate
from .sglang_response import Told


class Reply(Response):
    """The answer to one request, once it is through the gate.

    What is wrong with a request is found behind the gate, so a stream that is refused has begun
    with a 200 and says so in its only event.

    Args:
        front: The front end.
        body: What was asked.
    """

    def __init__(self, front: Frontend, body: GenerateBody) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._front = front
        self._body = body
        self._received_ts = time.time()
        self._received = trio.current_time()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; the ASGI interface."""
        if self._body.stream:
            await self._stream(receive, send)
            return
        async with until_disconnect(receive):
            response = await self._whole()
            await response(scope, receive, send)

    async def _whole(self) -> Response:
        try:
            asked = read_generate(self._body)
            with self._front.known(asked.items):
                async with self._front.gate.request():
                    with self._front.begin(asked.items) as generation:
                        await generation.wait_finished()
                        answers = self._answers(generation, asked.items)
        except SglangError as exc:
            return refusal(exc)
        return json_response(answers if asked.batch else answers[0])

    def _answers(self, generation: Generation, items: Iterable[Item]) -> list[Json]:
        if generation.failed:
            raise engine_died()
        return [self._told(generation, index, item).answer() for index, item in enumerate(items)]

    def _told(self, generation: Generation, index: int, item: Item) -> Told:
        sequence = generation.sequences[index]
        first = generation.first_token_at.get(sequence)
        end = generation.finished_at.get(sequence)
        return Told(
            sequence=sequence,
            label=self._front.label,
            logprobs=item.logprobs,
            experts_from=item.experts_from if self._front.settings.tell_experts else None,
            received_ts=self._received_ts,
            first_token_s=None if first is None else first - self._received,
            end_s=None if end is None else end - self._received,
        )

    async def _stream(self, receive: Receive, send: Send) -> None:
        async with until_disconnect(receive):
            await send({"type": "http.response.start", "status": self.status_code,
                        "headers": self.raw_headers})  # fmt: skip
            try:
                await self._events(send)
            except SglangError as exc:
                await send_more(send, event(exc.event()))
            await send_more(send, LAST_EVENT)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, send: Send) -> None:
        asked = read_generate(self._body)
        with self._front.known(asked.items):
            async with self._front.gate.request():
                with self._front.begin(asked.items) as generation:
                    await self._follow(generation, asked.items, send, batch=asked.batch)

    async def _follow(
        self, generation: Generation, items: tuple[Item, ...], send: Send, *, batch: bool
    ) -> None:
        """Send what is new whenever something is. A slow reader gets fewer, longer events."""
        sent: list[int | None] = [0] * len(items)  # None: told how it ended
        while any(one is not None for one in sent):
            await generation.wait_progress()
            if generation.failed:
                raise engine_died()
            await send_more(send, b"".join(self._news(generation, items, sent, batch=batch)))

    def _news(
        self,
        generation: Generation,
        items: tuple[Item, ...],
        sent: list[int | None],
        *,
        batch: bool,
    ) -> Iterator[bytes]:
        incremental = self._front.settings.incremental_streaming_output
        for index, item in enumerate(items):
            sequence, start = generation.sequences[index], sent[index]
            if start is None or not (sequence.finished or sequence.output_length > start):
                continue
            chunk = self._told(generation, index, item).answer(start if incremental else 0)
            sent[index] = None if sequence.finished else sequence.output_length
            yield event({**chunk, "index": index} if batch else chunk)


def refusal(error: SglangError) -> Response:
    """Answer with an error."""
    response = json_response(error.body, error.status)
    if error.status >= 500:
        response.headers["connection"] = "close"
    return response
