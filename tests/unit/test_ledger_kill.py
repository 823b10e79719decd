"""The demo, killed by SIGKILL at random moments: what it loses, and what it does twice.

The servers run on, and count. ``AREALTRIO_KILLS`` says how often it is killed,
``AREALTRIO_KILL_SEED`` when.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from arealtrio.demo.options import DemoOptions
from arealtrio.demo.run import LEDGER_FLUSH_S
from arealtrio.demo.task import Prompts, base_model
from arealtrio.embedded.sampling import SamplingParams
from arealtrio.embedded.serve import ServerSettings, running_server

KILLS = int(os.environ.get("AREALTRIO_KILLS", "20"))
SEED = int(os.environ.get("AREALTRIO_KILL_SEED", "0"))
SERVERS = 2
OPTIONS = DemoOptions(steps=10 + 2 * KILLS, batch_size=8, group_size=2, max_staleness=2)
REQUESTS_MAX = 80  # before a kill: of a first window, or of some steps after it


def known_by(token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """What tells a prompt at a server, which does not see its id; a continuation of it, too."""
    return (*token_ids[:3], len(token_ids) + max_tokens)


def names() -> dict[tuple[int, ...], str]:
    """What each prompt is known by. Among a thousand a few are alike: these are not told apart."""
    found: dict[tuple[int, ...], str] = {}
    for prompt in Prompts(OPTIONS.seed, OPTIONS.prompts):
        key = known_by(prompt["input_ids"], prompt["max_new_tokens"])
        found[key] = f"one of {found[key]}" if key in found else prompt["prompt_id"]
    return found


NAMES = names()


class Watched:
    """The servers' own count of what was asked of them, request by request."""

    def __init__(self) -> None:
        self.asked: list[str] = []  # prompts, in order
        self.more = trio.Event()

    def watch(self, submit: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            request_id: str, token_ids: Sequence[int], params: SamplingParams, **more: Any
        ) -> Any:
            assert params.max_tokens is not None
            self.asked.append(NAMES[known_by(token_ids, params.max_tokens)])
            self.more.set()
            self.more = trio.Event()
            return submit(request_id, token_ids, params, **more)

        return call

    async def until(self, count: int) -> None:
        while len(self.asked) < count:
            await self.more.wait()


def finished(directory: Path) -> set[str]:
    """The prompts that the ledger, as the killed trainer left it, holds the groups of.

    Those of weights newer than the checkpoint's are to be made again.
    """
    checkpoint = directory / "checkpoint.json"
    state = (checkpoint.exists() and json.loads(checkpoint.read_text())["rollout"]) or {}
    if not (directory / "ledger").exists():
        return set()
    copy = directory / "copy"
    for suffix in ("", "-wal"):
        source = directory / f"ledger{suffix}"
        if source.exists():
            shutil.copy(source, f"{copy}{suffix}")
    with sqlite3.connect(copy) as db:
        there = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'groups'").fetchone()
        rows = db.execute(
            "SELECT mark FROM prompts JOIN groups USING (key) WHERE tail <= ?",
            (state.get("version", 0),),
        ).fetchall() if there else []  # fmt: skip
    db.close()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{copy}{suffix}").unlink(missing_ok=True)
    return {mark for (mark,) in rows}


async def live(
    directory: Path, urls: list[str], watched: Watched, kill_after: int | None, rng: random.Random
) -> bool:
    """One life of the trainer; say whether it was killed, and not at its end already."""
    options = {
        "--state": directory,
        "--steps": OPTIONS.steps,
        "--batch-size": OPTIONS.batch_size,
        "--group-size": OPTIONS.group_size,
        "--max-staleness": OPTIONS.max_staleness,
    }
    words = [str(word) for option in options.items() for word in option]
    servers = [word for url in urls for word in ("--server", url)]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "arealtrio", "demo", *words, *servers],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        async with trio.open_nursery() as nursery:
            if kill_after is not None:

                async def kill() -> None:
                    await watched.until(len(watched.asked) + kill_after)
                    await trio.sleep(rng.uniform(0, 2 * LEDGER_FLUSH_S))  # the moment is to be any
                    process.send_signal(signal.SIGKILL)

                nursery.start_soon(kill)
            status = await process.wait()
            nursery.cancel_scope.cancel()
    finally:
        process.kill()  # harmless once it has ended
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.timeout(60 + 15 * KILLS)
async def test_a_trainer_killed_at_random_moments_trains_every_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(SEED)
    assert len(NAMES) >= 0.97 * OPTIONS.prompts
    base_model().save(tmp_path / "v0")
    state = tmp_path / "state"
    watched = Watched()
    async with trio.open_nursery() as nursery:
        urls = []
        for _ in range(SERVERS):
            settings = ServerSettings(weights=tmp_path / "v0", max_num_seqs=16, token_time_s=0.001)
            url = await nursery.start(serve, settings, watched, monkeypatch)
            urls.append(url)
        kills = 0
        kept: set[str] = set()
        for _ in range(KILLS):
            before = len(watched.asked)
            kills += await live(state, urls, watched, rng.randint(1, REQUESTS_MAX), rng)
            again = kept & set(watched.asked[before:])
            assert not again, f"generated again though finished: {again} (seed {SEED})"
            kept |= finished(state)
        before = len(watched.asked)
        assert not await live(state, urls, watched, None, rng)
        assert not kept & set(watched.asked[before:])
        nursery.cancel_scope.cancel()
    ended = json.loads((state / "checkpoint.json").read_text())
    trained = Counter(ended["tally"]["prompts"])
    assert trained == Counter(str(n) for n in range(OPTIONS.prompts))
    report = ended["report"]
    assert (report["prompts"], report["prompts_repeated"]) == (OPTIONS.prompts, 0)
    assert (report["steps"], kills) == (OPTIONS.steps, KILLS)
    assert report["staleness_max"] <= OPTIONS.max_staleness
    assert kept
    # What was generated twice was unfinished, not durable yet, or of weights that were lost.
    asked_once = OPTIONS.group_size * OPTIONS.prompts
    assert asked_once <= len(watched.asked) <= asked_once * (1 + KILLS)


async def serve(
    settings: ServerSettings,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    task_status: trio.TaskStatus[str],
) -> None:
    async with running_server(settings) as server:
        monkeypatch.setattr(server.scheduler, "submit", watched.watch(server.scheduler.submit))
        task_status.started(server.url)
        await trio.sleep_forever()
