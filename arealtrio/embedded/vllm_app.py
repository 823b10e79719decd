"""The HTTP face of the embedded server in vLLM's dialect: routes, and nothing decided here.

Source: vLLM 0.32.0's own answers, recorded in tests/golden/vllm-0.32.0, with its development routes
(``VLLM_SERVER_DEV_MODE=1``) and its token-in-token-out routes (``--enable-scale-out``) on.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

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
    query_of,
    read_body,
    whole_answer,
)
from .metrics import metrics_page
from .scheduler import EngineDead
from .settings import ServerSettings
from .vllm_adapters import VllmAdapters
from .vllm_error import VllmError, engine_error, missing, rpc_error, validation_error
from .vllm_fields import Body, decode_body, flag, integer
from .vllm_generate import CHAT, COMPLETION, TOKENS, Kind, begin
from .vllm_response import Json
from .vllm_transfer import WeightTransfer

VERSION = "0.32.0"  # of the vLLM whose answers these are
PAUSE_MODES = ("abort", "wait", "keep")


def vllm_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """Return the ASGI application. It starts nothing: whoever serves it also runs ``engine.run``.

    Args:
        engine: Generates.
        settings: Names and limits to report.
    """
    return app_of(VllmFace(engine, settings))


def app_of(face: VllmFace) -> Starlette:
    """Return the application of a face, which says what its routes are."""
    return Starlette(
        routes=[*face.routes(), Route("/openapi.json", face.openapi, methods=["GET"])],
        exception_handlers={
            VllmError: _refuse,
            404: detail("Not Found"),
            405: detail("Method Not Allowed"),
        },
    )


class VllmFace:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._transfer = WeightTransfer(engine)
        self._adapters = VllmAdapters(engine.adapters)
        self._started_at = engine.unix_time()
        self._started = int(self._started_at)
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
            "/v1/chat/completions": self.chat,
            "/inference/v1/abort_requests": self.abort_tokens, "/abort_requests": self.abort,
            "/pause": self.pause, "/resume": self.resume, "/sleep": self.sleep,
            "/wake_up": self.wake_up, "/collective_rpc": self.collective_rpc,
            "/update_weight_version": self.update_weight_version,
            "/reset_prefix_cache": self.reset_prefix_cache,
            "/init_weight_transfer_engine": self.init_transfer,
            "/start_weight_update": self.start_update, "/update_weights": self.update_weights,
            "/finish_weight_update": self.finish_update,
            "/v1/load_lora_adapter": self.load_adapter,
            "/v1/unload_lora_adapter": self.unload_adapter,
        }  # fmt: skip
        return [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
        ]

    # -- generating --------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Token ids in, an OpenAI completion out."""
        return await self._generate(request, COMPLETION)

    async def chat(self, request: Request) -> Response:
        """Messages with images in, token ids of prompt and answer out."""
        return await self._generate(request, CHAT)

    async def generate(self, request: Request) -> Response:
        """Token ids in, token ids and version spans out."""
        return await self._generate(request, TOKENS)

    async def _generate(self, request: Request, kind: Kind) -> Response:
        self._requests += 1
        body = await _body(request)
        if self._engine.faults.silent:
            return await never_answer(request)
        header = request.headers.get("x-request-id")
        reply = begin(self._engine, self._settings, kind, body, header)
        return EventStream(reply) if reply.streamed else await whole_answer(request, reply)

    async def abort(self, request: Request) -> Response:
        """Finish requests by id; all of them if no ids are given."""
        ids = _request_ids(await _body(request))
        return json_response({"status": "aborted", "aborted": self._engine.abort(ids)})

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
        mode = query_of(request).get("mode", "abort")
        if mode not in PAUSE_MODES:
            expected = "'abort', 'wait' or 'keep'"
            message = f"Input should be {expected}"
            raise validation_error("query.mode", "literal_error", message, mode, expected=expected)
        await self._engine.pause(mode)  # type: ignore[arg-type]  # one of PAUSE_MODES
        return json_response({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        """Go on."""
        self._engine.resume()
        return json_response({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        """Whether anything stopped it."""
        return json_response({"is_paused": self._engine.scheduler.pause_mode is not None})

    async def sleep(self, request: Request) -> Response:
        """Stop, and forget the cache (there is none)."""
        level = integer(query_of(request), "level", 1, "query") or 0
        await self._engine.sleep()
        return json_response({"status": "sleeping", "level": level})

    async def wake_up(self, request: Request) -> Response:
        """End the sleep, or a part of it: it goes on when both parts are awake."""
        tags = query_of(request).getlist("tags") or None
        self._engine.wake_up(tags)
        return json_response({"status": "awake", "tags": tags})

    async def is_sleeping(self, _: Request) -> Response:
        """Whether it sleeps."""
        return json_response({"is_sleeping": bool(self._engine.asleep)})

    # -- weights -----------------------------------------------------------------------------

    async def collective_rpc(self, request: Request) -> Response:
        """Call a method of every worker; there is one worker, and one method: reload_weights."""
        body = await _body(request)
        if "method" not in body:
            raise missing("method")
        if body["method"] != "reload_weights":
            raise rpc_error(f"'Worker' object has no attribute '{body['method']}'")
        kwargs = body.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise rpc_error("argument after ** must be a mapping")
        await self._reload(kwargs)
        return json_response({"results": [None]})

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
        self._engine.set_version(label)
        return json_response({"success": True, "new_version": label})

    async def init_transfer(self, request: Request) -> Response:
        """Say where weights come from."""
        return json_response(self._transfer.initialise(await _body(request)))

    async def start_update(self, _: Request) -> Response:
        """Open an update."""
        return json_response(self._transfer.start())

    async def update_weights(self, request: Request) -> Response:
        """Take weights."""
        return json_response(await self._transfer.update(await _body(request)))

    async def finish_update(self, request: Request) -> Response:
        """Close an update, and label the weights if told."""
        return json_response(self._transfer.finish(await _body(request)))

    async def load_adapter(self, request: Request) -> Response:
        """Take an adapter; only its name matters here."""
        return PlainTextResponse(self._adapters.load(await _body(request)))

    async def unload_adapter(self, request: Request) -> Response:
        """Forget an adapter."""
        return PlainTextResponse(self._adapters.unload(await _body(request)))

    async def weight_info(self, _: Request) -> Response:
        """The label."""
        return json_response({"weight_version": self._engine.scheduler.weight_version})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Forget cached prefixes (none exist); running requests go back into the queue if told."""
        if flag(query_of(request), "reset_running_requests", "query"):
            self._engine.retract()
        return json_response({"success": True})

    # -- about the server --------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """Alive: true of a poisoned engine, too, as in vLLM; not of a dead one."""
        await self._engine.faults.on_health()
        return Response(status_code=503 if self._engine.scheduler.state == "dead" else 200)

    async def load(self, _: Request) -> Response:
        """0, always, as in vLLM without ``--enable-server-load-tracking``."""
        return json_response({"server_load": 0})

    async def metrics(self, _: Request) -> Response:
        """The Prometheus page."""
        page = metrics_page(
            self._engine.scheduler,
            model=self._settings.served_model_name,
            requests=self._requests,
            started=self._started_at,
        )
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, _: Request) -> Response:
        """The vLLM it stands in for."""
        return json_response({"version": VERSION})

    async def world_size(self, _: Request) -> Response:
        """One worker."""
        return json_response({"world_size": 1})

    async def models(self, _: Request) -> Response:
        """The one model, and after it the adapters."""
        card, base = self._model_card(), self._settings.served_model_name
        adapters = [
            {**card, "id": name, "root": path, "parent": base}
            for name, path in self._engine.adapters.paths.items()
        ]
        return json_response({"object": "list", "data": [card, *adapters]})

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

    async def server_info(self, request: Request) -> Response:
        """The parts of vLLM's configuration that this server has, as text unless asked for JSON."""
        settings = self._settings
        config = {
            "model_config": {
                "served_model_name": settings.served_model_name,
                "max_model_len": settings.max_model_len,
                "logprobs_mode": settings.reported_logprobs,
                "seed": settings.seed,
            },
            "scheduler_config": {"max_num_seqs": settings.max_num_seqs},
            "parallel_config": {"data_parallel_size_local": 1},
            "aux_output_config": {"enable_return_routed_experts": settings.tell_experts},
        }
        as_json = query_of(request).get("config_format") == "json"
        shown = config if as_json else str(config)
        return json_response({"vllm_config": shown, "vllm_env": {}, "system_env": {}})

    async def openapi(self, _: Request) -> Response:
        """The routes, so that a client sees what is there."""
        paths: Json = {
            route.path: {method.lower(): {} for method in sorted(route.methods - {"HEAD"})}
            for route in self.routes()
            if isinstance(route, Route) and route.methods is not None
        }
        info = {"title": "arealtrio embedded server", "version": VERSION}
        return json_response({"openapi": "3.1.0", "info": info, "paths": paths})


async def _body(request: Request) -> dict[str, Any]:
    try:
        return decode_body(await read_body(request))
    except BodyTooLarge as exc:
        raise VllmError("The request body is too large", status=413) from exc


def _request_ids(body: Body) -> list[str] | None:
    ids = body.get("request_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        message = "Input should be a valid list"
        raise validation_error("body.request_ids", "list_type", message, ids)
    return ids


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, VllmError)
    response = json_response(exc.body, exc.status)
    if exc.status >= 500:  # vLLM closes the connection too, but without a word
        response.headers["connection"] = "close"
    return response
