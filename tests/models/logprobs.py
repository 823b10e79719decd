"""What the compiled scanner must give, by the standard library's json and plain lists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Column = tuple[list[int] | None, list[float] | None] | None

TOKEN = re.compile(r"token_id:(0|[1-9][0-9]*)\Z", re.ASCII)


class Pairs(list[tuple[str, Any]]):
    """An object with its keys in order, twice where they are there twice."""


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _integer(text: str) -> int | float:
    return int(text) if len(text) < 400 else float(text)  # int() refuses thousands of digits


def parse(body: bytes) -> Any:
    return json.loads(
        body.decode(), parse_constant=_refuse, parse_int=_integer, object_pairs_hook=Pairs
    )


def plain(value: Any) -> Any:
    """The document as json gives it by default: of a key that is there twice, the last."""
    if isinstance(value, Pairs):
        return {key: plain(item) for key, item in value}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def as_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError("not an id")
    return value


def as_float(value: Any) -> float:
    if value is None:
        return float("nan")
    if type(value) not in (int, float):
        raise ValueError("not a number")
    with np.errstate(over="ignore"):
        number = np.float32(float(value))  # OverflowError is an ArithmeticError: see scan
    if not np.isfinite(number):
        raise ValueError("not a float32")
    return float(number)


def as_list(value: Any) -> list[Any]:
    if isinstance(value, list) and not isinstance(value, Pairs):
        return value
    raise ValueError("not a list")


def read_record(item: Any) -> tuple[int, float]:
    pairs = item if isinstance(item, Pairs) else Pairs()
    fields = [(key, value) for key, value in pairs if key in ("token_id", "logprob")]
    if sorted(key for key, _ in fields) != ["logprob", "token_id"]:
        raise ValueError("not once each")
    return as_id(dict(fields)["token_id"]), as_float(dict(fields)["logprob"])


def read_pair(item: Any) -> tuple[int, float]:
    logprob, token, *_ = as_list(item)
    return as_id(token), as_float(logprob)


def read_token_strings(items: list[Any]) -> list[int] | None:
    if not all(isinstance(item, str) for item in items):
        raise ValueError("not a string")
    matches = [TOKEN.match(item) for item in items]
    ids = [int(match[1]) for match in matches if match and int(match[1]) < 2**31]
    return ids if len(ids) == len(items) else None


def read(kind: str, value: Any) -> Column:
    items = as_list(value)
    if kind == "ids":
        return [as_id(item) for item in items], None
    if kind == "floats":
        return None, [as_float(item) for item in items]
    if kind == "token_strings":
        return read_token_strings(items), None
    both = [read_pair(item) if kind == "pairs" else read_record(item) for item in items]
    return [token for token, _ in both], [logprob for _, logprob in both]


def scan(wanted: Mapping[str, str], body: bytes) -> tuple[dict[str, Column], Any]:
    """The columns as lists, and the rest as ``json.loads`` reads it; ValueError where refused."""
    try:
        document = parse(body)
        columns: dict[str, Column] = {p: None for p, kind in wanted.items() if kind != "drop"}
        rest = lift("", document, wanted, columns)
    except OverflowError as exc:
        raise ValueError("not a float64") from exc
    return columns, rest


def lift(path: str, value: Any, wanted: Mapping[str, str], columns: dict[str, Column]) -> Any:
    """``value`` with null for what is wanted in it, which is read into ``columns``."""
    if path in wanted:
        if value is not None and wanted[path] != "drop":
            columns[path] = read(wanted[path], value)
        return None
    deeper = [other[len(path) :].lstrip(".") for other in wanted if (other + ".").startswith(path)]
    steps = {step.partition(".")[0] for step in deeper} if leads_on(path, wanted) else set()
    if isinstance(value, Pairs):
        keys = [key for key, _ in value if key in steps and not key.isdigit()]
        if len(keys) != len(set(keys)):
            raise ValueError("a key twice")
        return {
            key: lift(join(path, key), item, wanted, columns) if key in keys else plain(item)
            for key, item in value
        }
    if isinstance(value, list):
        return [
            lift(join(path, str(i)), item, wanted, columns) if str(i) in steps else plain(item)
            for i, item in enumerate(value)
        ]
    return value


def leads_on(path: str, wanted: Mapping[str, str]) -> bool:
    return not path or any(other.startswith(path + ".") for other in wanted)


def join(path: str, step: str) -> str:
    return f"{path}.{step}" if path else step
