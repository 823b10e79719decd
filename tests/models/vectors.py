"""What is asked of vectors, of plain lists."""

from __future__ import annotations

from collections.abc import Sequence


def plain_are_ids(values: Sequence[object]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def plain_has_nan(values: Sequence[float]) -> bool:
    return any(str(value) == "nan" for value in values)


def plain_ascends(values: Sequence[int], least: int) -> bool:
    return [least, *values] == sorted([least, *values])
