"""The HTTP face of a vLLM that AReaL started: vLLM's public routes, and AReaL's own in place of the
development ones.

There is no recording of it. Source: AReaL, areal/engine/vllm_ext/areal_vllm_server.py, as the
client side of ``wire.vllm_areal`` reads it. Answers are ``{"success": …, "message": …}``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .engine import Engine
from .http import json_response, read_body
from .scheduler import EngineDead
from .settings import ServerSettings
from .tensors import Tensor, tensors
from .vllm_app import VllmFace, app_of

PUBLIC = ("/health", "/metrics", "/version", "/v1/models", "/v1/completions",
          "/v1/chat/completions", "/v1/load_lora_adapter",
          "/v1/unload_lora_adapter")  # fmt: skip
T = TypeVar("T")


class _FromDisk(msgspec.Struct):
    model_path: str


class _Group(msgspec.Struct):
    master_address: str
    master_port: str
    rank_offset: int
    world_size: int
    backend: str
    group_name: str


class _Meta(msgspec.Struct):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str
    lora_name: str = ""
    lora_int_id: int = 0
    lora_target_modules: list[str] = []
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_bias: str = ""
    base_model_name: str = ""


def areal_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """Return the ASGI application; see ``vllm_app``."""
    return app_of(ArealFace(engine, settings))


class ArealFace(VllmFace):
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        super().__init__(engine, settings)
        self._groups: set[str] = set()
        self._expected: list[Tensor] = []

    def routes(self) -> list[BaseRoute]:
        """vLLM's public ones, and AReaL's."""
        public = [r for r in super().routes() if isinstance(r, Route) and r.path in PUBLIC]
        own = {
            "/areal_pause_generation": self.pause_generation,
            "/areal_continue_generation": self.continue_generation,
            "/areal_update_weights": self.from_disk,
            "/areal_init_weights_update_group": self.init_group,
            "/areal_set_update_weight_meta": self.set_meta,
            "/areal_update_weights_xccl": self.receive,
            "/areal_set_update_weight_meta_lora": self.set_meta,
            "/areal_update_weights_lora_xccl": self.receive_adapter,
        }
        return [*public, *(Route(path, call, methods=["POST"]) for path, call in own.items())]

    async def pause_generation(self, _: Request) -> Response:
        """Return what is in flight, and hold back what comes."""
        await self._engine.pause("abort")
        return _said("Generation paused")

    async def continue_generation(self, _: Request) -> Response:
        """Go on."""
        self._engine.resume()
        return _said("Generation continued")

    async def from_disk(self, request: Request) -> Response:
        """Load a directory; whatever comes of it, it goes on then, paused by others or not."""
        try:
            body = await _read(request, _FromDisk)
            await self._engine.reload(Path(body.model_path), fatal=True)
        except (OSError, ValueError, EngineDead) as exc:
            return _said(str(exc), success=False)
        finally:
            self._engine.resume()
        return _said("Weights updated")

    async def init_group(self, request: Request) -> Response:
        """Join the trainer's process group."""
        try:
            self._groups.add((await _read(request, _Group)).group_name)
        except ValueError as exc:
            return _said(str(exc), success=False)
        return _said("Group initialised")

    async def set_meta(self, request: Request) -> Response:
        """Hear what comes."""
        try:
            meta = await _read(request, _Meta)
            self._expected = tensors(meta.names, meta.dtypes, meta.shapes)
        except ValueError as exc:
            return _said(str(exc), success=False)
        joined = meta.group_name in self._groups
        return _said("Meta set" if joined else "there is no such group", success=joined)

    async def receive(self, _: Request) -> Response:
        """Take the announced tensors as received."""
        expected, self._expected = self._expected, []
        if not expected:
            return _said("nothing was announced", success=False)
        self._engine.announced += expected
        return _said("Weights updated")

    async def receive_adapter(self, request: Request) -> Response:
        """Take the announced tensors as those of an adapter, which both requests describe."""
        try:
            meta = await _read(request, _Meta)
        except ValueError as exc:
            return _said(str(exc), success=False)
        if not (meta.lora_name and meta.lora_int_id and meta.lora_rank):
            return _said("an adapter needs a name, a number and a rank", success=False)
        answer = await self.receive(request)
        if answer.status_code == 200:
            self._engine.adapters.receive(meta.lora_name)
        return answer


async def _read(request: Request, kind: type[T]) -> T:
    """Read a body.

    Raises:
        ValueError: It is not of that shape.
    """
    try:
        return msgspec.json.decode(await read_body(request), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ValueError(str(exc)) from exc


def _said(message: str, *, success: bool = True) -> Response:
    return json_response({"success": success, "message": message}, 200 if success else 400)
