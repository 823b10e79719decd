"""The words and the shape in which vLLM refuses, imitated from its recorded answers."""

from __future__ import annotations


class VllmError(Exception):
    """An answer in vLLM's error shape.

    Args:
        message: Its message.
        status: The HTTP status, which is also its ``code``.
        kind: Its ``type``.
        param: Its ``param``, the field at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def engine_error() -> VllmError:
    """What every caller of a dead engine is told."""
    return VllmError(
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        status=500,
        kind="InternalServerError",
    )


def rpc_error(reason: str) -> VllmError:
    """What the caller of a failed ``collective_rpc`` is told."""
    return VllmError(
        f"Call to collective_rpc method failed: Worker failed with error '{reason}', "
        "please check the stack trace above for the root cause",
        status=500,
        kind="InternalServerError",
    )


def not_found(message: str) -> VllmError:
    """Something named in the body is not there."""
    return VllmError(message, status=404, kind="NotFoundError")


def missing(field: str) -> VllmError:
    """A control route's body lacks ``field``."""
    return VllmError(f"Missing '{field}' in request body", kind="Bad Request")


def validation_error(loc: str, kind: str, msg: str, value: object, **ctx: object) -> VllmError:
    """Imitate how vLLM prints one pydantic error; containers are summed up, as it does."""
    detail: dict[str, object] = {"type": kind, "loc": loc, "msg": msg, "input": _shown(value)}
    if ctx:
        detail["ctx"] = ctx
    return VllmError(f"1 validation error:\n  {detail}", kind="Bad Request", param=loc)


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)[:100]


def value_error(message: str, param: str, value: object = None) -> VllmError:
    """Imitate vLLM's own validation errors, which repeat the parameter at the end."""
    where = f"(parameter={param})" if value is None else f"(parameter={param}, value={value})"
    return VllmError(f"{message} {where}", param=param)
