"""The HTTP face of the embedded server in vLLM's dialect: routes, and nothing decided here.

Source: vLLM 0.32.0's own answers, recorded in tests/golden/vllm-0.32.0, with its development routes
(``VLLM_SERVER_DEV_MODE=1``) and its token-in-token-out routes (``--enable-scale-out``) on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from . import vllm_response
from .engine import Engine, Generation
from .metrics import metrics_page
from .scheduler import EngineDead
from .settings import ServerSettings
from .vllm_request import (
    Body,
    GenerateRequest,
    VllmError,
    decode_body,
    engine_error,
    missing,
    read_completion,
    read_tokens,
    rpc_error,
    validation_error,
)
from .vllm_response import Answer, Cursor, Json

VERSION = "0.32.0"  # of the vLLM whose answers these are
BODY_LIMIT_BYTES = 64 * 1024 * 1024
PAUSE_MODES = ("abort", "wait", "keep")


def vllm_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """Return the ASGI application. It starts nothing: whoever serves it also runs ``engine.run``.

    Args:
        engine: Generates.
        settings: Names and limits to report.
    """
    face = _Face(engine, settings)
    return Starlette(
        routes=[*face.routes(), Route("/openapi.json", face.openapi, methods=["GET"])],
        exception_handlers={
            VllmError: _refuse,
            404: _detail("Not Found"),
            405: _detail("Method Not Allowed"),
        },
    )


@dataclass(frozen=True, slots=True)
class _Kind:
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
    read: Callable[..., GenerateRequest]
    whole: Callable[[Answer], Json]
    chunk: Callable[[Answer, Cursor], Json]
    usage: Callable[[Answer], Json]

    def engine_ids(self, request_id: str, prompts: int) -> list[str]:
        """The ids that abort names, one for each prompt."""
        return [f"{request_id}-{i}" if self.numbered else request_id for i in range(prompts)]


_COMPLETION = _Kind(
    prefix="cmpl-",
    numbered=True,
    read=read_completion,
    whole=vllm_response.completion,
    chunk=vllm_response.completion_chunk,
    usage=vllm_response.completion_usage_chunk,
)
_TOKENS = _Kind(
    prefix="generate-tokens-",
    numbered=False,
    read=read_tokens,
    whole=vllm_response.tokens,
    chunk=vllm_response.tokens_chunk,
    usage=vllm_response.tokens_usage_chunk,
)


class _Face:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._started = int(time.time())
        self._requests = 0

    def routes(self) -> list[BaseRoute]:
        """Every route vLLM documents in its schema."""
        get = {
            "/health": self.health, "/ping": self.health, "/load": self.load,
            "/metrics": self.metrics, "/version": self.version, "/v1/models": self.models,
            "/is_paused": self.is_paused, "/is_sleeping": self.is_sleeping,
            "/weight_info": self.weight_info, "/server_info": self.server_info,
            "/get_world_size": self.world_size,
        }  # fmt: skip
        post = {
            "/v1/completions": self.completions, "/inference/v1/generate": self.generate,
            "/inference/v1/abort_requests": self.abort_tokens, "/abort_requests": self.abort,
            "/pause": self.pause, "/resume": self.resume, "/sleep": self.sleep,
            "/wake_up": self.wake_up, "/collective_rpc": self.collective_rpc,
            "/update_weight_version": self.update_weight_version,
            "/reset_prefix_cache": self.reset_prefix_cache,
        }  # fmt: skip
        return [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
        ]

    # -- generating --------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Token ids in, an OpenAI completion out."""
        return await self._generate(request, _COMPLETION)

    async def generate(self, request: Request) -> Response:
        """Token ids in, token ids and version spans out."""
        return await self._generate(request, _TOKENS)

    async def _generate(self, request: Request, kind: _Kind) -> Response:
        self._requests += 1
        body = await _body(request)
        asked = kind.read(
            body,
            model=self._settings.served_model_name,
            vocab_size=self._engine.scheduler.model.vocab_size,
            max_model_len=self._settings.max_model_len,
        )
        request_id = kind.prefix + _client_id(request, asked)
        generation = self._start(asked, kind.engine_ids(request_id, len(asked.prompts)))
        answer = Answer(
            request_id,
            self._settings.served_model_name,
            int(time.time()),
            asked,
            generation.sequences,
        )
        if asked.stream:
            return _EventStream(generation, answer, kind)
        return await _whole(request, generation, answer, kind)

    def _start(self, asked: GenerateRequest, engine_ids: list[str]) -> Generation:
        """Queue every answer of every prompt; answers to one prompt share its id."""
        try:
            return self._engine.generate(
                [
                    (engine_id, prompt, asked.params.numbered(number))
                    for engine_id, prompt in zip(engine_ids, asked.prompts, strict=True)
                    for number in range(asked.n)
                ]
            )
        except EngineDead as exc:
            raise engine_error() from exc

    async def abort(self, request: Request) -> Response:
        """Finish requests by id; all of them if no ids are given."""
        ids = _request_ids(await _body(request))
        return _json({"status": "aborted", "aborted": self._engine.abort(ids)})

    async def abort_tokens(self, request: Request) -> Response:
        """Finish requests by id; the answer is empty."""
        ids = _request_ids(await _body(request))
        if ids is None:
            raise missing("request_ids")
        self._engine.abort(ids)
        return Response()

    # -- pausing -----------------------------------------------------------------------------

    async def pause(self, request: Request) -> Response:
        """Stop; in mode ``wait`` the answer comes when the running have finished."""
        mode = request.query_params.get("mode", "abort")
        if mode not in PAUSE_MODES:
            expected = "'abort', 'wait' or 'keep'"
            message = f"Input should be {expected}"
            raise validation_error("query.mode", "literal_error", message, mode, expected=expected)
        await self._engine.pause(mode)  # type: ignore[arg-type]  # one of PAUSE_MODES
        return _json({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        """Go on."""
        self._engine.resume()
        return _json({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        """Whether anything stopped it."""
        return _json({"is_paused": self._engine.scheduler.pause_mode is not None})

    async def sleep(self, request: Request) -> Response:
        """Stop, and forget the cache (there is none)."""
        level = int(request.query_params.get("level", "1"))
        await self._engine.sleep(level)
        return _json({"status": "sleeping", "level": level})

    async def wake_up(self, _: Request) -> Response:
        """End the sleep."""
        self._engine.wake_up()
        return _json({"status": "awake", "tags": None})

    async def is_sleeping(self, _: Request) -> Response:
        """Whether it sleeps."""
        return _json({"is_sleeping": self._engine.sleep_level is not None})

    # -- weights -----------------------------------------------------------------------------

    async def collective_rpc(self, request: Request) -> Response:
        """Call a method of every worker; there is one worker, and one method: reload_weights."""
        body = await _body(request)
        if "method" not in body:
            raise missing("method")
        if body["method"] != "reload_weights":
            raise rpc_error(f"'Worker' object has no attribute '{body['method']}'")
        await self._reload(body.get("kwargs") or {})
        return _json({"results": [None]})

    async def _reload(self, kwargs: Body) -> None:
        path = Path(str(kwargs.get("weights_path") or self._settings.weights))
        try:
            await self._engine.reload(path, fatal=True)
        except EngineDead as exc:
            raise engine_error() from exc
        except (OSError, ValueError) as exc:
            raise rpc_error(str(exc)) from exc

    async def update_weight_version(self, request: Request) -> Response:
        """Label the weights."""
        label = (await _body(request)).get("new_version")
        if not isinstance(label, str):
            message = "Input should be a valid string"
            raise validation_error("body.new_version", "string_type", message, label)
        self._engine.scheduler.set_version(label)
        return _json({"success": True, "new_version": label})

    async def weight_info(self, _: Request) -> Response:
        """The label."""
        return _json({"weight_version": self._engine.scheduler.weight_version})

    async def reset_prefix_cache(self, _: Request) -> Response:
        """Forget cached prefixes. The model computes from its window each time, so none exist."""
        return _json({"success": True})

    # -- about the server --------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """Alive: true of a poisoned engine, too, as in vLLM; not of a dead one."""
        return Response(status_code=503 if self._engine.scheduler.state == "dead" else 200)

    async def load(self, _: Request) -> Response:
        """0, always, as in vLLM without ``--enable-server-load-tracking``."""
        return _json({"server_load": 0})

    async def metrics(self, _: Request) -> Response:
        """The Prometheus page."""
        page = metrics_page(
            self._engine.scheduler,
            model=self._settings.served_model_name,
            requests=self._requests,
        )
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, _: Request) -> Response:
        """The vLLM it stands in for."""
        return _json({"version": VERSION})

    async def world_size(self, _: Request) -> Response:
        """One worker."""
        return _json({"world_size": 1})

    async def models(self, _: Request) -> Response:
        """The one model."""
        return _json({"object": "list", "data": [self._model_card()]})

    def _model_card(self) -> Json:
        return {
            "id": self._settings.served_model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "vllm",
            "root": str(self._settings.weights),
            "parent": None,
            "max_model_len": self._settings.max_model_len,
            "permission": [self._permission()],
        }

    def _permission(self) -> Json:
        return {
            "id": f"modelperm-{secrets.token_hex(8)}",
            "object": "model_permission",
            "created": self._started,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }

    async def server_info(self, _: Request) -> Response:
        """The parts of vLLM's configuration that this server has."""
        settings = self._settings
        config = {
            "model_config": {
                "served_model_name": settings.served_model_name,
                "max_model_len": settings.max_model_len,
                "logprobs_mode": settings.logprobs_mode,
                "seed": settings.seed,
            },
            "scheduler_config": {"max_num_seqs": settings.max_num_seqs},
        }
        return _json({"vllm_config": config, "vllm_env": {}, "system_env": {}})

    async def openapi(self, _: Request) -> Response:
        """The routes, so that a client sees what is there."""
        paths: Json = {
            route.path: {method.lower(): {} for method in sorted(route.methods - {"HEAD"})}
            for route in self.routes()
            if isinstance(route, Route) and route.methods is not None
        }
        info = {"title": "arealtrio embedded server", "version": VERSION}
        return _json({"openapi": "3.1.0", "info": info, "paths": paths})


class _EventStream(Response):
    """Server-sent events of one generation, until it ends or the client goes away.

    Starlette's own streaming response takes an async generator, whose clean-up after a cancelled
    ``send`` waits for the garbage collector; here the ``with`` block releases at once. A reader
    slower than the engine gets fewer, longer events, so nothing piles up.
    """

    def __init__(self, generation: Generation, answer: Answer, kind: _Kind) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation = generation
        self._answer = answer
        self._kind = kind
        self._cursors = [Cursor(index) for index in range(len(answer.sequences))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        with self._generation:
            async with _until_disconnect(receive):
                await send({"type": "http.response.start", "status": self.status_code,
                            "headers": self.raw_headers})  # fmt: skip
                while not all(cursor.ended for cursor in self._cursors):
                    await self._generation.wait_progress()
                    await _send_more(send, self._new_events())
                await _send_more(send, self._last_events())
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _new_events(self) -> bytes:
        if self._generation.failed:
            for cursor in self._cursors:
                cursor.ended = True
            return _event(engine_error().body)
        return b"".join(
            _event(self._kind.chunk(self._answer, cursor))
            for cursor in self._cursors
            if not cursor.ended and self._has_news(cursor)
        )

    def _has_news(self, cursor: Cursor) -> bool:
        sequence = self._answer.sequences[cursor.index]
        return sequence.finished or sequence.output_length > cursor.sent

    def _last_events(self) -> bytes:
        wanted = self._answer.request.include_usage and not self._generation.failed
        return (_event(self._kind.usage(self._answer)) if wanted else b"") + b"data: [DONE]\n\n"


async def _send_more(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _whole(request: Request, generation: Generation, answer: Answer, kind: _Kind) -> Response:
    """Wait for the end and answer in one piece; the sequences go if the client goes."""
    with generation:
        async with _until_disconnect(request.receive):
            await generation.wait_finished()
    if generation.failed:
        raise engine_error()
    return _json(kind.whole(answer))


@asynccontextmanager
async def _until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client has gone away."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
        yield
        nursery.cancel_scope.cancel()


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _body(request: Request) -> dict[str, Any]:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > BODY_LIMIT_BYTES:
            raise VllmError("The request body is too large", status=413)
    return decode_body(bytes(raw))


def _client_id(request: Request, asked: GenerateRequest) -> str:
    return request.headers.get("x-request-id") or asked.request_id or secrets.token_hex(8)


def _request_ids(body: Body) -> list[str] | None:
    ids = body.get("request_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        message = "Input should be a valid list"
        raise validation_error("body.request_ids", "list_type", message, ids)
    return ids


def _json(body: Json, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _event(body: Json) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, VllmError)
    response = _json(exc.body, exc.status)
    if exc.status >= 500:  # vLLM closes the connection too, but without a word
        response.headers["connection"] = "close"
    return response


def _detail(text: str) -> Callable[[Request, Exception], Response]:
    def answer(_: Request, exc: Exception) -> Response:
        headers = getattr(exc, "headers", None)
        response = _json({"detail": text}, exc.status_code)  # type: ignore[attr-defined]
        response.headers.update(headers or {})
        return response

    return answer
