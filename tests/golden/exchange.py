"""Read a recorded exchange back into the records that dialects take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arealtrio.types import HttpResponse

ROOT = Path(__file__).parent


def names(server: str) -> set[str]:
    """Every recording of one server, by file name."""
    return {path.name for path in (ROOT / server).iterdir()}


def answer(server: str, name: str) -> HttpResponse:
    """The recorded answer; a page or stream that was saved alone is taken as a 200."""
    raw = (ROOT / server / name).read_bytes()
    if not name.endswith(".json"):
        return HttpResponse(200, {"content-type": "text/plain"}, raw)
    recorded = json.loads(raw)
    if "response" not in recorded or "request" not in recorded:  # a body that was saved alone
        return HttpResponse(200, {"content-type": "application/json"}, raw)
    response = recorded["response"]
    body = response.get("body", "")
    payload = body if isinstance(body, str) else json.dumps(body)
    return HttpResponse(response["status"], response["headers"], payload.encode())


def body_of(server: str, name: str) -> Any:
    """The recorded answer's JSON, by the standard library."""
    return json.loads(answer(server, name).body)


def question(server: str, name: str) -> dict[str, Any]:
    """The recorded request: method, path, params, headers, json."""
    request = json.loads((ROOT / server / name).read_bytes())["request"]
    assert isinstance(request, dict)
    return request
