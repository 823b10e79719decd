"""What fuzz tests share: values of any type, and JSON that was right until it was damaged.

A damaged document is a recorded one in which parts were taken out, put elsewhere, or replaced by
what a parser likes least; it is written as text by hand, since much of it is what no JSON writer
would write: NaN, half of a surrogate pair, nesting without end.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st

SECRET = "sk-do-not-repeat-7f3a9c51e2b84d60"
"""In values that are wrong: no message may repeat it."""


class Hostile:
    """An object that refuses to be printed or compared."""

    def __repr__(self) -> str:
        raise ValueError(SECRET)

    def __bool__(self) -> bool:
        raise ValueError(SECRET)

    def __eq__(self, other: object) -> bool:
        raise ValueError(SECRET)

    def __hash__(self) -> int:
        raise ValueError(SECRET)


def _endless() -> list[Any]:
    """A list that holds itself."""
    inside: list[Any] = []
    inside.append(inside)
    return inside


ODD_NUMBERS = [
    2**20, 2**23, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**400,
    math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0, Decimal("NaN"), Decimal(3), Fraction(1, 3),
    Fraction(10**400), np.int64(3), np.int8(-1), np.uint64(2**64 - 1), np.float32(0.5),
    np.float64("nan"), np.float16(1), np.bool_(True), 1 + 2j,
]  # fmt: skip
# Too long to be printed, even by hypothesis, which names what it samples from.
huge = st.builds(pow, st.sampled_from([10, -10]), st.sampled_from([5001]))
ODD_TEXTS = [
    "", " ", "\0", "a\r\nb: c", "\ud800", "\udcff", "é", "\u2028", "x" * 10_000, "5", "1e9", "nan",
    "True", "http://a", "http://a:80", "https://b:443/", "http://[", "http://a:x", "http://a:0",
    f"http://user:{SECRET}@a", f"http://user:{SECRET}@a:x", f"ftp://user:{SECRET}@a",
    f"http://a?key={SECRET}", "http://a b", "http://\u00fc", "http://a\x7f", "/no/such/place",
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.integers()
    | st.sampled_from(ODD_NUMBERS)
    | huge
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD_TEXTS)
    | st.binary(max_size=4)
)
objects = st.builds(object) | st.builds(Hostile) | st.builds(_endless) | st.sampled_from(
    [int, len, types.SimpleNamespace(), np.arange(3), np.zeros((2, 2)), np.array([]), np.array("a"),
     range(3), iter(()), {1, 2}, frozenset(), ..., Ellipsis, b"\xff", bytearray(b"x")]
)  # fmt: skip
anything = st.recursive(
    scalars | objects,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(ODD_TEXTS), inner, max_size=2)
    ),
    max_leaves=5,
)

# --- documents -------------------------------------------------------------------------------

_DEEP = "@deep@"  # written as so many brackets
_HUGE = "@huge@"  # written as an integer of thousands of digits

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0, 1e300, math.nan, math.inf])
    | huge
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["", "0", "token_id:1", "default", "\ud800", "x" * 500, SECRET, _DEEP]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just(SECRET), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Each value of a document, as the container and the key or index it is found under."""
    found: list[tuple[Any, Any]] = []
    open_ends = [document]
    while open_ends:
        one = open_ends.pop()
        keys: Any = ()
        if isinstance(one, dict):
            keys = list(one)
        elif isinstance(one, list):
            keys = range(len(one))
        for key in keys:
            found.append((one, key))
            open_ends.append(one[key])
    return found


@st.composite
def damaged(draw: st.DrawFn, documents: list[Any]) -> Any:
    """One of the documents with up to four changes to its structure."""
    document = [copy.deepcopy(draw(st.sampled_from(documents)))]
    for _ in range(draw(st.integers(0, 4))):
        all_places = places(document)
        container, key = all_places[draw(st.integers(0, len(all_places) - 1))]
        match draw(st.sampled_from(["replace", "replace", "delete", "move", "wrap", "repeat"])):
            case "replace":
                container[key] = draw(json_values)
            case "delete" if container is not document:
                del container[key]
            case "move":
                other, where = all_places[draw(st.integers(0, len(all_places) - 1))]
                container[key] = copy.deepcopy(other[where])
            case "wrap":
                container[key] = draw(st.sampled_from([[container[key]], {"x": container[key]}]))
            case "repeat" if isinstance(container, list) and container is not document:
                container.append(copy.deepcopy(container[key]))
    return document[0]


def written(document: Any, *, depth: int = 2000) -> bytes:
    """A document as JSON text, odd values and all."""
    text = json.dumps(_with_marks(document))
    text = text.replace(json.dumps(_DEEP), "[" * depth + "]" * depth)
    return text.replace(json.dumps(_HUGE), "1" + "0" * 5001).encode()


def _with_marks(value: Any) -> Any:
    """The same, with a mark for what Python does not write."""
    if isinstance(value, dict):
        return {key: _with_marks(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_marks(item) for item in value]
    is_huge = isinstance(value, int) and abs(value) >= 10**4300
    return _HUGE if is_huge else value


@st.composite
def bodies(draw: st.DrawFn, documents: list[Any]) -> bytes:
    """A damaged document as bytes, perhaps cut short or with a few of them changed."""
    body = written(draw(damaged(documents)), depth=draw(st.sampled_from([3, 100, 100_000])))
    match draw(st.sampled_from(["whole", "whole", "whole", "cut", "changed", "any"])):
        case "cut":
            return body[: draw(st.integers(0, len(body)))]
        case "changed":
            return changed(draw, body)
        case "any":
            return draw(st.binary(max_size=60))
    return body


def changed(draw: Callable[..., Any], body: bytes) -> bytes:
    """A few bytes replaced, put in or taken out."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 3)) :]
    return body


def pieces(body: bytes, cuts: list[int]) -> list[bytes]:
    """The same bytes, as they may arrive."""
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(edges)]


cut_places = st.lists(st.integers(0, 10**6), max_size=6)


def check_message(error: BaseException, *named: str) -> None:
    """An error is short words, names what it is about, and repeats no secret.

    Args:
        error: Which.
        named: One of these is in its message; none: there is nothing to be named.
    """
    words = str(error)
    assert 0 < len(words) <= 600
    assert SECRET not in words
    assert not named or any(name in words for name in named), f"{words} names none of {named}"
