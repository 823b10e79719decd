"""What a trainer announces before it sends weights over its own network: names, types and shapes.

There is no such network here, so an announced tensor is checked and remembered, the answer is that
of a server which received it, and the weights stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tensor(NamedTuple):
    """One announced tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def tensors(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Pair up what was announced.

    Raises:
        ValueError: The three differ in length, or a size is negative.
    """
    if not len(names) == len(dtypes) == len(shapes):
        raise ValueError(
            f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes do not pair up"
        )
    if any(size < 0 for shape in shapes for size in shape):
        raise ValueError("a shape has a negative size")
    return [
        Tensor(name, dtype, tuple(shape))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]
