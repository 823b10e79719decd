"""Both dialects in memory: what asks for tokens is taken directly, the rest by its endpoint.

Nothing is decided here: ``Reply`` is the embedded server's own, and so are its applications. Most
requests ask for tokens, and going through the application costs thrice as much.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ..embedded.endpoints import Endpoints, Handler
from ..embedded.engine import Engine
from ..embedded.http import Reply
from ..embedded.settings import ServerSettings
from ..embedded.sglang_app import sglang_app
from ..embedded.sglang_frontend import Frontend
from ..embedded.sglang_generate import Reply as SglangReply
from ..embedded.sglang_request import GenerateBody, decode
from ..embedded.vllm_app import vllm_app
from ..embedded.vllm_fields import decode_body
from ..embedded.vllm_generate import COMPLETION, TOKENS, Kind, begin
from ..types import HttpRequest
from .asgi import AsgiApp

_KINDS: dict[str, Kind] = {"/v1/completions": COMPLETION, "/inference/v1/generate": TOKENS}
# Of what a run asks often, that which nothing holds up: no load of weights, nothing that drains.
_VLLM_AT_ONCE = frozenset(
    {
        "/metrics",
        "/pause?mode=abort",
        "/pause?mode=keep",
        "/reset_prefix_cache?reset_running_requests=true",
        "/resume",
        "/update_weight_version",
        "/weight_info",
    }
)
_SGLANG_AT_ONCE = frozenset(
    {
        "/continue_generation",
        "/metrics",
        "/model_info",
        "/pause_generation",  # each of its modes
        "/update_weight_version",
    }
)


class Face(Protocol):
    """How a server speaks."""

    def generates(self, request: HttpRequest) -> bool:
        """Whether a request is for tokens."""

    def open(self, request: HttpRequest) -> Reply | None:
        """Take a request for tokens; None where it is something else, for ``app_for``.

        Raises:
            VllmError: It is refused.
            SglangError: It is refused.
        """

    def handler_at_once(self, request: HttpRequest) -> Handler | None:
        """What answers another request without waiting for anything; None: ask ``app_for``."""

    def app_for(self, request: HttpRequest) -> AsgiApp:
        """What answers any other request. It raises what ``open`` does."""

    @property
    def asleep(self) -> Collection[str]:
        """The memory that it let go of, by tag."""


class VllmFace:
    """See ``Face``.

    Args:
        engine: Generates.
        settings: Names and limits.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._endpoints = Endpoints(vllm_app(engine, settings))
        self._engine = engine
        self._settings = settings

    @property
    def asleep(self) -> Collection[str]:
        """See ``Face``."""
        return self._engine.asleep

    def generates(self, request: HttpRequest) -> bool:
        """See ``Face``."""
        return request.path in _KINDS and request.method == "POST"

    def open(self, request: HttpRequest) -> Reply | None:
        """See ``Face``."""
        if not self.generates(request):
            return None
        kind = _KINDS[request.path]
        body, header_id = decode_body(request.body), _header_id(request)
        return begin(self._engine, self._settings, kind, body, header_id)

    def handler_at_once(self, request: HttpRequest) -> Handler | None:
        """See ``Face``."""
        if request.path not in _VLLM_AT_ONCE:
            return None
        return self._endpoints.handler(request.method, request.path.partition("?")[0])

    def app_for(self, request: HttpRequest) -> AsgiApp:
        """See ``Face``. What has no endpoint, the application refuses."""
        return self._endpoints.of(request.method, request.path.partition("?")[0])


def _header_id(request: HttpRequest) -> str | None:
    for name, value in request.headers:
        if name.lower() == "x-request-id":
            return value
    return None


class SglangFace:
    """See ``Face``.

    Args:
        engine: Generates.
        settings: Names and limits.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._front = Frontend.of(engine, settings)
        self._endpoints = Endpoints(sglang_app(engine, settings, self._front))

    @property
    def asleep(self) -> Collection[str]:
        """See ``Face``."""
        return self._front.released

    def generates(self, request: HttpRequest) -> bool:
        """See ``Face``."""
        return request.path == "/generate" and request.method == "POST"

    def open(self, request: HttpRequest) -> Reply | None:
        """See ``Face``."""
        if not self.generates(request):
            return None
        return SglangReply(self._front, decode(request.body, GenerateBody))

    def handler_at_once(self, request: HttpRequest) -> Handler | None:
        """See ``Face``."""
        if request.path not in _SGLANG_AT_ONCE:
            return None
        return self._endpoints.handler(request.method, request.path.partition("?")[0])

    def app_for(self, request: HttpRequest) -> AsgiApp:
        """See ``Face``. What has no endpoint, the application refuses."""
        return self._endpoints.of(request.method, request.path.partition("?")[0])


def face_of(engine: Engine, settings: ServerSettings) -> Face:
    """The face of the dialect that the settings name."""
    face = SglangFace if settings.dialect == "sglang" else VllmFace
    return face(engine, settings)
