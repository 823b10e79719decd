"""Read a JSON body field by field as leniently as vLLM's pydantic does: null is the default."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from .http import NOT_JSON
from .vllm_error import validation_error

_TRUTH = {True: True, False: False, "true": True, "false": False}
T = TypeVar("T")
Body = Mapping[str, Any]


def decode_body(raw: bytes) -> dict[str, Any]:
    """Parse a body that has to be a JSON object; an empty one is ``{}``."""
    if not raw:
        return {}
    try:
        body = msgspec.json.decode(raw)
    except NOT_JSON as exc:
        message = "JSON decode error"
        raise validation_error("body", "json_invalid", message, {}, error=str(exc)) from exc
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise validation_error("body", "model_attributes_type", message, body)
    return body


def token_ids(value: object, loc: str) -> list[int]:
    """Read a list of ids that are not negative; whether the vocabulary has them, others ask."""
    if not isinstance(value, list):
        raise validation_error(loc, "list_type", "Input should be a valid list", value)
    for index, item in enumerate(value):
        if type(item) is not int:
            message = "Input should be a valid integer"
            raise validation_error(f"{loc}.{index}", "int_type", message, item)
        if item < 0:
            message = "Input should be greater than or equal to 0"
            raise validation_error(f"{loc}.{index}", "greater_than_equal", message, item, ge=0)
    return value


def integer(body: Body, name: str, default: int | None, loc: str = "body") -> int | None:
    """Read an integer; "8" and 8.0 are integers."""
    if body.get(name) is None:
        return default
    return _parsed(body, name, default, loc, _to_int, "int_parsing", "integer")


def number(body: Body, name: str, default: float, loc: str = "body") -> float:
    """Read a finite number."""
    value = _parsed(body, name, default, loc, _to_float, "float_parsing", "number")
    return default if value is None else value


def flag(body: Body, name: str, loc: str = "body") -> bool:
    """Read a truth value; not there is False."""
    value = body.get(name)
    if value is None or value is False:
        return False
    return bool(_parsed(body, name, False, loc, _to_bool, "bool_parsing", "boolean"))


def text(body: Body, name: str) -> str | None:
    """Read a string, which must be one."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        message = "Input should be a valid string"
        raise validation_error(f"body.{name}", "string_type", message, value)
    return value


def number_by_id(body: Body, name: str, loc: str = "body") -> dict[int, float]:
    """Read an object of finite numbers by token id, which JSON writes as strings."""
    value = body.get(name) or {}
    try:
        return {int(key): _to_float(item) for key, item in value.items()}
    except (AttributeError, TypeError, ValueError) as exc:
        message = "Input should be a valid dictionary"
        raise validation_error(f"{loc}.{name}", "dict_type", message, value) from exc


def _parsed(
    body: Body,
    name: str,
    default: T | None,
    loc: str,
    convert: Callable[[Any], T],
    kind: str,
    noun: str,
) -> T | None:
    """Read one field as leniently as pydantic does: null is the default, "8" is a number."""
    value = body.get(name)
    if value is None:
        return default
    try:
        return convert(value)
    except (TypeError, ValueError) as exc:
        suffix = f", unable to parse string as {_article(noun)}" if isinstance(value, str) else ""
        message = f"Input should be a valid {noun}{suffix}"
        raise validation_error(f"{loc}.{name}", kind, message, value) from exc


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _to_int(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("a fraction")
    if not isinstance(value, int | float | str):
        raise TypeError("no number")
    return int(value)


def _to_float(value: Any) -> float:
    if not isinstance(value, int | float | str):
        raise TypeError("no number")
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool | int | str) or value not in _TRUTH:
        raise ValueError("no boolean")
    return _TRUTH[value]
