"""What is asked of vectors, of plain lists."""

from __future__ import annotations

from collections.abc import Sequence


def plain_are_ids(values: Sequence[object]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def plain_has_nan(values: Sequence[float]) -> bool:
    return any(str(value) == "nan" for value in values)


def plain_ascends(values: Sequence[int], least: int) -> bool:
    return [least, *values] == sorted([least, *values])


def plain_columns(
    parts: Sequence[tuple[list[int], list[float] | None, list[int] | None]],
) -> tuple[list[int], list[int], list[float], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for tokens, told, by in parts:
        ids += tokens
        mask += [0 if told is None else 1] * len(tokens)
        logprobs += [0.0] * len(tokens) if told is None else told
        versions += [-1] * len(tokens) if by is None else by
    return ids, mask, logprobs, versions
