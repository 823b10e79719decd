"""The HTTP face of the embedded server in SGLang's dialect: routes, and nothing decided here.

Source: SGLang 0.5.23's own answers, recorded in tests/golden/sglang-0.5.23, as with
``--enable-lora`` and ``--enable-metrics``. An abort of a request that is frozen in place is
answered at once; a real server does that when it goes on.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from .engine import Engine
from .http import (
    BodyTooLarge,
    EventStream,
    detail,
    json_response,
    never_answer,
    read_body,
    whole_answer,
)
from .settings import ServerSettings
from .sglang_error import Json, SglangError
from .sglang_frontend import Frontend
from .sglang_generate import Reply
from .sglang_memory import Memory, release, resume
from .sglang_metrics import sglang_metrics_page
from .sglang_request import GenerateBody, decode
from .sglang_weights import DestroyGroup, FromDisk, FromDistributed, InitGroup, Label, Weights

VERSION = "0.5.23"  # of the SGLang whose answers these are
HEALTH_CHECKS = 20  # looks at a probe before a real one says 503
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running or "
    "waiting requests, the operation will not be performed.)\n"
)
T = TypeVar("T")


class _Abort(msgspec.Struct):
    rid: str = ""
    abort_all: bool = False


class _Pause(msgspec.Struct):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class _LoadAdapter(msgspec.Struct):
    lora_name: str
    lora_path: str


class _UnloadAdapter(msgspec.Struct):
    lora_name: str


def sglang_app(
    engine: Engine, settings: ServerSettings, front: Frontend | None = None
) -> Starlette:
    """Return the ASGI application. It starts nothing: whoever serves it also runs ``engine.run``.

    Args:
        engine: Generates.
        settings: Names and limits to report.
        front: The front end, where others go through it as well.
    """
    return Starlette(
        routes=_Face(engine, settings, front or Frontend.of(engine, settings)).routes(),
        exception_handlers={
            SglangError: _refuse,
            404: detail("Not Found"),
            405: detail("Method Not Allowed"),
        },
    )


class _Face:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings, front: Frontend) -> None:
        self._engine = engine
        self._settings = settings
        self._front = front
        self._weights = Weights(self._front)
        self._started = int(engine.unix_time())
        self._first_label = self._front.label
        self._requests = 0

    def routes(self) -> list[BaseRoute]:
        """Every route, by the methods it takes."""
        get = {
            "/health": self.health, "/health_generate": self.health, "/metrics": self.metrics,
            "/model_info": self.model_info, "/get_model_info": self.model_info,
            "/server_info": self.server_info, "/get_server_info": self.server_info,
            "/v1/models": self.models,
        }  # fmt: skip
        post = {
            "/abort_request": self.abort, "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/update_weights_from_disk": self.update_from_disk,
            "/update_weight_version": self.update_version,
            "/init_weights_update_group": self.init_group,
            "/destroy_weights_update_group": self.destroy_group,
            "/begin_weight_update": self.begin_update, "/end_weight_update": self.end_update,
            "/update_weights_from_distributed": self.update_from_distributed,
            "/load_lora_adapter": self.load_adapter, "/unload_lora_adapter": self.unload_adapter,
        }  # fmt: skip
        both = {
            "/flush_cache": self.flush_cache, "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
        }  # fmt: skip
        return [
            Route("/generate", self.generate, methods=["POST", "PUT"]),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            *(Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in both.items()),
        ]

    # -- generating --------------------------------------------------------------------------

    async def generate(self, request: Request) -> Response:
        """Token ids in, token ids, logprobs and version spans out."""
        self._requests += 1
        body = await _body(request, GenerateBody)
        if self._engine.faults.silent:
            return await never_answer(request)
        reply = Reply(self._front, body)
        return EventStream(reply) if reply.streamed else await whole_answer(request, reply)

    async def abort(self, request: Request) -> Response:
        """Finish requests by id, or all; the answer is empty."""
        body = await _body(request, _Abort)
        if body.abort_all:
            self._engine.abort()
        else:
            self._front.abort(body.rid)
        return Response()

    # -- pausing -----------------------------------------------------------------------------

    async def pause(self, request: Request) -> Response:
        """Stop. Mode ``abort`` stops no scheduler: it empties it, and lets nothing more in."""
        body = await _body(request, _Pause)
        self._front.gate.pause()
        if body.mode == "abort":
            self._engine.abort()
        else:
            await self._engine.pause(body.mode)
        return _done("Generation paused successfully.")

    async def resume(self, _: Request) -> Response:
        """Go on."""
        self._engine.resume()
        self._front.gate.resume()
        return _done("Generation continued successfully.")

    async def flush_cache(self, _: Request) -> Response:
        """Forget cached prefixes (none exist), which is refused while anything uses them."""
        if not self._weights.can_flush():
            return PlainTextResponse("Flush cache failed.\n", 400)
        return Response(FLUSHED)

    # -- weights -----------------------------------------------------------------------------

    async def update_from_disk(self, request: Request) -> Response:
        """Load a directory."""
        return json_response(await self._weights.from_disk(await _body(request, FromDisk)))

    async def update_version(self, request: Request) -> Response:
        """Label the weights."""
        return json_response(self._weights.label(await _body(request, Label)))

    async def init_group(self, request: Request) -> Response:
        """Join the trainer's process group."""
        return json_response(self._weights.init_group(await _body(request, InitGroup)))

    async def destroy_group(self, request: Request) -> Response:
        """Leave it."""
        return json_response(self._weights.destroy_group(await _body(request, DestroyGroup)))

    async def begin_update(self, _: Request) -> Response:
        """Open a session of distributed updates."""
        return json_response(self._weights.begin())

    async def end_update(self, _: Request) -> Response:
        """Close it."""
        return json_response(self._weights.end())

    async def update_from_distributed(self, request: Request) -> Response:
        """Take announced tensors as received."""
        body = await _body(request, FromDistributed)
        return json_response(await self._weights.from_distributed(body))

    async def load_adapter(self, request: Request) -> Response:
        """Take an adapter; only its name matters here."""
        body = await _body(request, _LoadAdapter)
        if body.lora_name in self._engine.adapters:
            return self._adapters_said(
                f"Failed to load LoRA adapter {body.lora_name} because it is already loaded"
            )
        try:
            self._engine.adapters.load(body.lora_name, body.lora_path)
        except FileNotFoundError as exc:
            return self._adapters_said(str(exc))
        return self._adapters_said(None)

    async def unload_adapter(self, request: Request) -> Response:
        """Forget an adapter."""
        name = (await _body(request, _UnloadAdapter)).lora_name
        if name not in self._engine.adapters:
            loaded = self._engine.adapters.paths.keys()
            return self._adapters_said(
                f"LoRA with name {name} does not exist. Loaded LoRAs: {loaded}"
            )
        self._engine.adapters.unload(name)
        return self._adapters_said(None)

    def _adapters_said(self, error: str | None) -> Response:
        answer = {
            "rid": None,
            "http_worker_ipc": None,
            "success": error is None,
            "error_message": error or "",
            "loaded_adapters": self._engine.adapters.paths,
        }
        return json_response(answer, 200 if error is None else 400)

    async def release_memory(self, request: Request) -> Response:
        """Let go of memory; the answer is null."""
        release(self._front, self._weights, await _body(request, Memory))
        return json_response(None)

    async def resume_memory(self, request: Request) -> Response:
        """Take it back; the answer is null."""
        resume(self._front, await _body(request, Memory))
        return json_response(None)

    # -- about the server --------------------------------------------------------------------

    async def health(self, _request: Request) -> Response:
        """Whether a probe that generates one token came back; see ``health_time_s``."""
        await self._engine.faults.on_health()
        if self._engine.scheduler.state == "dead":
            return Response(status_code=503)
        period_s = self._settings.health_time_s
        if not period_s:
            return Response()
        for _ in range(HEALTH_CHECKS):
            await trio.sleep(period_s)
            if not self._front.gate.paused:  # else the probe is held back like any request
                return Response()
        return Response(status_code=503)

    async def metrics(self, _: Request) -> Response:
        """The Prometheus page."""
        page = sglang_metrics_page(
            self._engine.scheduler,
            model=self._settings.served_model_name,
            requests=self._requests,
        )
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        """The one model, and after it the adapters."""
        name = self._settings.served_model_name
        cards = [self._card(name, name, None)]
        cards += [self._card(one, path, name) for one, path in self._engine.adapters.paths.items()]
        return json_response({"object": "list", "data": cards})

    def _card(self, name: str, root: str, parent: str | None) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "sglang",
            "root": root,
            "parent": parent,
            "max_model_len": None if parent else self._settings.max_model_len,
        }

    async def model_info(self, _: Request) -> Response:
        """Which weights are in service, and how they are labelled."""
        return json_response(
            {
                "model_path": self._front.model_path,
                "served_model_name": self._settings.served_model_name,
                "tokenizer_path": str(self._settings.weights),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self._front.label,
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "disaggregation_mode": "null",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": "tiny",
                "architectures": [type(self._engine.scheduler.model).__name__],
            }
        )

    async def server_info(self, _: Request) -> Response:
        """The parts of SGLang's configuration that this server has, as it was started."""
        settings = self._settings
        return json_response(
            {
                "model_path": str(settings.weights),
                "tokenizer_path": str(settings.weights),
                "served_model_name": settings.served_model_name,
                "context_length": settings.max_model_len,
                "max_running_requests": settings.max_num_seqs,
                "random_seed": settings.seed,
                "weight_version": self._first_label,
                "incremental_streaming_output": settings.incremental_streaming_output,
                "enable_lora": True,
                "enable_return_routed_experts": settings.tell_experts,
                "enable_metrics": True,
                "host": settings.host,
                "tp_size": 1,
                "dp_size": 1,
                "status": "ready",
                "max_req_input_len": settings.max_model_len - 1,
                "internal_states": [
                    {"effective_max_running_requests_per_dp": settings.max_num_seqs}
                ],
                "version": VERSION,
            }
        )


async def _body(request: Request, kind: type[T]) -> T:
    try:
        return decode(await read_body(request), kind)
    except BodyTooLarge as exc:
        raise SglangError("The request body is too large", status=413) from exc


def _done(message: str) -> Response:
    return json_response({"message": message, "status": "ok"})


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, SglangError)
    response = json_response(exc.body, exc.status)
    if exc.status >= 500:
        response.headers["connection"] = "close"
    return response
