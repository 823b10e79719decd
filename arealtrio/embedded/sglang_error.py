"""The shapes in which SGLang refuses, as recorded in tests/golden/sglang-0.5.23."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


class SglangError(Exception):
    """An answer that refuses.

    Args:
        message: Why.
        status: The HTTP status.
        body: The JSON to answer with; None is the native routes' own shape.
    """

    def __init__(self, message: str, *, status: int = 400, body: Json | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: Json = {"error": {"message": message}} if body is None else body

    def event(self) -> Json:
        """The same in a stream, which has begun with a 200."""
        return {
            "error": {
                "message": str(self),
                "type": "invalid_request_error",
                "code": self.status,
                "retryable": False,
            }
        }


def malformed(message: str) -> SglangError:
    """A body that is no JSON, lacks a field or has one of a wrong type."""
    body = {"object": "error", "message": message, "type": "Bad Request", "param": None,
            "code": 400}  # fmt: skip
    return SglangError(message, body=body)


def failed(message: str, **more: Any) -> SglangError:
    """A command that was understood and could not be done."""
    return SglangError(message, body={"success": False, "message": message, **more})


def engine_died() -> SglangError:
    """What those are told whose request was in flight; a real server resets the connection."""
    return SglangError("The scheduler died; start another server.", status=500)
