"""The ledger as lists and dicts, with a copy of them for what is durable."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field


@dataclass
class Prompt:
    key: int
    epoch: int
    position: int
    tail: int | None = None  # the newest version in its group
    group: int | None = None  # which group it became
    batch: int | None = None


@dataclass
class State:
    prompts: dict[int, Prompt] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)  # of delivered batches
    batch: int = -1
    acknowledged: int = -1
    acknowledged_version: int = -1
    checkpoints: list[tuple[int, int]] = field(default_factory=list)  # batch and serial
    serial: int = 0
    trimmed: int = -1
    next_key: int = 0


class ModelLedger:
    """What the ledger promises, said once more in the simplest words."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.lost: set[tuple[int, int]] = set()  # checkpoints that nobody got
        self.now = State()
        self.durable = State()

    # --- what is told ------------------------------------------------------------------------

    def take(self, epoch: int, count: int) -> list[int]:
        keys = []
        for _ in range(count):
            position = self.now.taken.get(epoch, 0)
            key = self.now.next_key
            self.now.prompts[key] = Prompt(key, epoch, position)
            self.now.taken[epoch] = position + 1
            self.now.next_key += 1
            keys.append(key)
        return keys

    def running(self) -> list[Prompt]:
        return [p for p in self.now.prompts.values() if p.group is None]

    def finished(self) -> list[Prompt]:
        return [p for p in self.now.prompts.values() if p.group is not None and p.batch is None]

    def settle(self, key: int, group: int, tail: int) -> None:
        self.now.prompts[key].group = group
        self.now.prompts[key].tail = tail

    def close(self, key: int) -> None:
        del self.now.prompts[key]

    def reopen(self, key: int) -> None:
        self.now.prompts[key].group = self.now.prompts[key].tail = None

    def deliver(self, keys: list[int], version: int) -> int:
        self.now.batch += 1
        self.now.versions[self.now.batch] = version
        for key in keys:
            self.now.prompts[key].batch = self.now.batch
        return self.now.batch

    def take_back(self) -> None:
        for prompt in self.now.prompts.values():
            if prompt.batch == self.now.batch:
                prompt.batch = None
        self.now.batch -= 1

    def move(self, key: int, epoch: int) -> None:
        self.now.prompts[key].epoch = epoch
        self.now.prompts[key].position = -1

    def flush(self) -> None:
        self.durable = copy.deepcopy(self.now)

    # --- what is trained ---------------------------------------------------------------------

    def ack(self, batch: int) -> None:
        if batch > self.now.acknowledged:
            self.now.acknowledged = batch
            self.now.acknowledged_version = self.now.versions.get(
                batch, self.now.acknowledged_version
            )
            self._trim()
        self.flush()

    def checkpoint(self, *, lost: bool = False) -> tuple[int, int]:
        now = self.now
        is_new = not now.checkpoints or now.checkpoints[-1][0] != now.batch
        if is_new:
            now.serial += 1
            known = [one for one in now.checkpoints if one not in self.lost] or [(-1, 0)]
            now.checkpoints = [*known, (now.batch, now.serial)][-self.kept :]
            self._trim()
        newest = now.checkpoints[-1]
        if not lost:
            self.lost -= {newest}
        elif is_new:
            self.lost.add(newest)
        self.flush()
        return newest

    def _trim(self) -> None:
        oldest = self.now.checkpoints[0][0] if self.now.checkpoints else self.now.acknowledged
        self.now.trimmed = max(self.now.trimmed, oldest)
        for key, prompt in list(self.now.prompts.items()):
            if prompt.batch is not None and prompt.batch <= self.now.trimmed:
                del self.now.prompts[key]

    # --- a crash -----------------------------------------------------------------------------

    def crash(self) -> None:
        self.now = copy.deepcopy(self.durable)
        self.lost.clear()
        self.now.next_key = max(self.now.prompts, default=-1) + 1

    def may_restore(self, checkpoint: tuple[int, int] | None, version: int) -> bool:
        now = self.now
        if checkpoint is None:
            return now.acknowledged_version <= version and now.acknowledged >= now.trimmed
        return checkpoint in now.checkpoints and checkpoint[0] >= now.trimmed

    def restore(self, checkpoint: tuple[int, int] | None, version: int) -> int:
        """Go on after a batch; return how many groups are made again."""
        now = self.now
        now.batch = now.acknowledged if checkpoint is None else checkpoint[0]
        if now.batch < now.acknowledged:
            now.acknowledged = now.batch
            now.acknowledged_version = min(
                now.acknowledged_version, version if now.batch >= 0 else -1
            )
        now.checkpoints = [one for one in now.checkpoints if one[0] <= now.batch]
        again = 0
        for prompt in now.prompts.values():
            if prompt.batch is not None and prompt.batch > now.batch:
                prompt.batch = None
            if prompt.batch is None and prompt.tail is not None and prompt.tail > version:
                self.reopen(prompt.key)
                again += 1
        self.flush()
        return again
