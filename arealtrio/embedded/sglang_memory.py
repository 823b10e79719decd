"""SGLang's release of memory while the trainer uses the GPU. There is none here but its rules."""

from __future__ import annotations

import msgspec

from .sglang_frontend import Frontend
from .sglang_weights import Weights

TAGS = ("kv_cache", "weights", "cuda_graph")


class Memory(msgspec.Struct):
    """The body of both routes; no tags, or none in the list, means all."""

    tags: list[str] | None = None


def release(front: Frontend, weights: Weights, body: Memory) -> None:
    """Release memory; only an idle server may.

    Raises:
        SglangError: Something runs, or a tag was released before. A real server dies of that.
    """
    if not weights.can_flush():
        raise front.fatal("release_memory_occupation should be called only when server is idle.")
    tags = set(body.tags or TAGS)
    if again := tags & front.released:
        raise front.fatal(f"released before: {', '.join(sorted(again))}")
    front.released |= tags


def resume(front: Frontend, body: Memory) -> None:
    """Take memory back.

    Raises:
        SglangError: A tag was not released. A real server dies of that.
    """
    tags = set(body.tags or TAGS)
    if missing := tags - front.released:
        raise front.fatal(f"not released: {', '.join(sorted(missing))}")
    front.released -= tags
