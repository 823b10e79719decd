"""Answer ``/generate``, in one piece or as a stream, and stop when the client goes away."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import InvalidRequest
from .engine import Engine, Generation
from .http import LAST_EVENT, event, json_response, send_more, until_disconnect
from .sampling import SamplingParams
from .scheduler import EngineDead
from .settings import ServerSettings
from .sglang_error import Json, SglangError, engine_died
from .sglang_gate import Gate
from .sglang_request import GenerateBody, Item, read_generate, sampling_params
from .sglang_response import Told


@dataclass(slots=True)
class Frontend:
    """What stands between HTTP and the scheduler in SGLang: names, labels, and who may go through.

    Args:
        engine: Generates.
        settings: Names and limits.
        label: The weights' label as the front end knows it. It moves when an update has succeeded
            as a whole; the spans of tokens follow the scheduler's own.
        model_path: Where the weights in service came from.
        gate: Holds requests back while paused.
        rids: Requests that were not answered yet.
        released: Memory that was released, by tag.
    """

    engine: Engine
    settings: ServerSettings
    label: str
    model_path: str
    gate: Gate = field(default_factory=Gate)
    rids: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)

    def begin(self, items: Iterable[Item]) -> Generation:
        """Queue the prompts of one request, all or none; call it inside the gate.

        Raises:
            SglangError: As SGLang would answer.
        """
        checked = [(item.rid, item.prompt, self._checked(item)) for item in items]
        try:
            return self.engine.generate(checked)
        except EngineDead as exc:
            raise engine_died() from exc
        except InvalidRequest as exc:
            raise SglangError(str(exc)) from exc

    def _checked(self, item: Item) -> SamplingParams:
        self._check_lora(item.lora)
        vocab_size = self.engine.scheduler.model.vocab_size
        params = sampling_params(
            item, vocab_size=vocab_size, max_model_len=self.settings.max_model_len
        )
        if not all(0 <= token_id < vocab_size for token_id in item.prompt):
            raise self.fatal(f"a token id is outside 0 … {vocab_size - 1}")
        if self.released:
            raise self.fatal(f"memory is released: {', '.join(sorted(self.released))}")
        return params

    def fatal(self, reason: str) -> SglangError:
        """What to answer where a real server dies; if this one is ``fragile``, it dies too."""
        if not self.settings.fragile:
            return SglangError(f"{reason}; a real server would die of it")
        self.engine.die()
        return engine_died()

    def _check_lora(self, name: str | None) -> None:
        if name is not None and name not in self.engine.adapters:
            raise SglangError(
                f"Got LoRA adapter that has never been loaded: {name}\n"
                f"All loaded adapters: {self.engine.adapters.paths.keys()}."
            )

    @contextmanager
    def known(self, items: Iterable[Item]) -> Iterator[None]:
        """Make requests known by their ids, by which they can be aborted.

        Raises:
            SglangError: One of them is known already.
        """
        rids = [item.rid for item in items]
        for rid in rids:
            if rid in self.rids:
                raise SglangError(f"Duplicate request ID detected: {rid}")
        self.rids.update(rids)
        try:
            yield
        finally:
            self.rids.difference_update(rids)

    def abort(self, rid: str) -> None:
        """Abort what is behind the gate and whose id *begins* with the id of a known request.

        Both is SGLang's: an unknown id is ignored, and the scheduler compares beginnings.
        """
        if rid not in self.rids:
            return
        scheduler = self.engine.scheduler
        everything = (*scheduler.running, *scheduler.waiting)
        self.engine.abort([s.request_id for s in everything if s.request_id.startswith(rid)])


class Reply(Response):
    """The answer to one request, once it is through the gate.

    What is wrong with a request is found behind the gate, so a stream that is refused has begun
    with a 200 and says so in its only event.

    Args:
        front: The front end.
        body: What was asked.
    """

    def __init__(self, front: Frontend, body: GenerateBody) -> None:
        media_type = "text/event-stream" if body.stream else "application/json"
        super().__init__(media_type=media_type)
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
            received_ts=self._received_ts,
            first_token_s=None if first is None else first - self._received,
            end_s=None if end is None else end - self._received,
        )

    async def _stream(self, receive: Receive, send: Send) -> None:
        async with until_disconnect(receive):
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
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
