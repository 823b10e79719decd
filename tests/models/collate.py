"""pad and pack on plain lists: a list and a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def plain_pad(rows: Sequence[Sequence[Item]], fill: Item, width: int) -> list[list[Item]]:
    return [[*row, *[fill] * (width - len(row))] for row in rows]


def plain_mask(rows: Sequence[Sequence[object]], width: int) -> list[list[bool]]:
    return [[column < len(row) for column in range(width)] for row in rows]


def plain_unpad(
    rectangle: Sequence[Sequence[Item]], mask: Sequence[Sequence[bool]]
) -> list[list[Item]]:
    return [
        [item for item, shown in zip(row, shows, strict=True) if shown]
        for row, shows in zip(rectangle, mask, strict=True)
    ]


def plain_pack(rows: Sequence[Sequence[Item]]) -> tuple[list[Item], list[int]]:
    packed: list[Item] = []
    starts = [0]
    for row in rows:
        packed.extend(row)
        starts.append(len(packed))
    return packed, starts


def plain_span(rows: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    made = [value for row in rows for value in row if value >= 0]
    return (min(made), max(made)) if made else None
