"""A ledger in a file of the test's own, and the shortest ways to put something into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arealtrio.ledger import Ledger, encode_prompt, mark_of, open_ledger
from arealtrio.trajectory import Group
from arealtrio.types import Trajectory

IDENTITY = {"consumer_batch_size": 4, "model": None}


def a_group(content: int = 0, length: int = 8, version: int = 0) -> Group:
    row = Trajectory(
        input_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.ones(length, np.int32),
        logprobs=np.full(length, -0.5, np.float32),
        versions=np.full(length, version, np.int32),
        reward=float(content),
    )
    return Group.of([[row]], number=content, permit_version=version, prompt_id="p", task_id="t")


def opened(path: Path, **more: Any) -> Any:
    return open_ledger(str(path), IDENTITY, **{"flush_s": 5.0, "inline": True, **more})


def take(ledger: Ledger, count: int, position: int = 0) -> list[int]:
    prompts = [{"prompt_id": str(position + n)} for n in range(count)]
    blobs = [encode_prompt(prompt) for prompt in prompts]
    marks = [mark_of(p, b) for p, b in zip(prompts, blobs, strict=True)]
    return list(ledger.take(0, position, list(zip(marks, blobs, strict=True))))


async def finish(ledger: Ledger, count: int, position: int = 0, **group: Any) -> list[int]:
    keys = take(ledger, count, position)
    for key in keys:
        ledger.settle(key, a_group(**group))
    return keys


async def left(path: Path, version: int = 0, state: Any = None) -> Any:
    """What a restart finds."""
    async with opened(path) as ledger:
        if state is not None:
            ledger.load_state_dict(state)
        return await ledger.restore(version)


@contextmanager
def copy_of(path: Path) -> Iterator[Path]:
    """The file as a crash at this moment would leave it."""
    copy = path.with_name("copy")
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    yield copy
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").unlink(missing_ok=True)
