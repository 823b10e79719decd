"""The decode loop around the scheduler, and what a handler holds while it waits for tokens.

The scheduler decides, the engine gives it time: it sleeps until there is work, takes one decode
step per ``token_time_s``, and wakes the handlers. What only decides is synchronous, so nothing
happens between a decision and its effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from ..types import PauseMode
from .adapters import Adapters
from .faults import Faults
from .sampling import SamplingParams
from .scheduler import Model, Scheduler
from .sequence import Sequence
from .tensors import Tensor

MEMORY = ("weights", "kv_cache")  # what sleep lets go of, by the names that wake_up takes


class Generation:
    """The sequences of one HTTP request. Leaving the ``with`` block drops those still unfinished.

    That release is synchronous, so it works in a cancelled scope too: a handler whose client went
    away leaves no sequence behind.

    Times are trio's: of each sequence its first token and its end. ``on_end`` is called when the
    last sequence has finished.
    """

    def __init__(self, engine: Engine, *, streamed: bool = False) -> None:
        self.sequences: list[Sequence] = []
        self.first_token_at: dict[Sequence, float] = {}
        self.finished_at: dict[Sequence, float] = {}
        self.on_end: Callable[[], None] = lambda: None
        self._engine = engine
        self._progress = trio.Event() if streamed else None  # set: there is something to send
        self._finished = trio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Drop what is unfinished; harmless twice."""
        self._engine.discard(self)

    @property
    def finished(self) -> bool:
        """Whether every sequence has finished."""
        return len(self.finished_at) == len(self.sequences)

    @property
    def failed(self) -> bool:
        """Whether the engine died under it."""
        return "error" in [sequence.finish_reason for sequence in self.sequences]

    def belongs_to(self, engine: Engine) -> bool:
        """Whether this engine makes it."""
        return self._engine is engine

    def wait_finished(self) -> Coroutine[Any, Any, None]:
        """Return when every sequence has finished, or at ``interrupt``; it is to be awaited."""
        return self._finished.wait()

    def interrupt(self) -> None:
        """Wake whoever waits for the end, ``finished`` or not."""
        self._finished.set()

    async def wait_progress(self) -> None:
        """Return when there is a new token or an end since the last return; of a stream only."""
        assert self._progress is not None
        await self._progress.wait()
        self._progress = trio.Event()

    def on_token(self, sequence: Sequence) -> None:
        """Wake whoever streams; the scheduler calls it."""
        if sequence not in self.first_token_at:
            self.first_token_at[sequence] = self._engine.now()
        self._news()

    def on_finish(self, sequence: Sequence) -> None:
        """Wake whoever waits; the scheduler calls it."""
        self.finished_at[sequence] = self._engine.now()
        self._news()
        if self.finished:
            self._finished.set()
            self.on_end()

    def _news(self) -> None:
        if self._progress is not None:
            self._progress.set()


class Engine:
    """Drives a scheduler by trio's clock.

    Args:
        scheduler: The state machine; call the engine's methods rather than the scheduler's, or
            nothing wakes the loop.
        load_model: Reads weights from a directory, in a worker thread. It raises OSError or
            ValueError for weights that are not there or not sound.
        token_time_s: Seconds of one decode step; 0 yields to other tasks between steps only.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        load_model: Callable[[Path], Model],
        *,
        token_time_s: float = 0.0,
    ) -> None:
        self.scheduler = scheduler
        self.token_time_s = token_time_s
        self.faults = Faults()
        self.adapters = Adapters()
        self.announced: list[Tensor] = []  # by updates over a network that is not here
        self.asleep: set[str] = set()
        self._load_model = load_model
        self._work = trio.Event()  # set: look at the scheduler again
        self._settled: dict[trio.Event, None] = {}  # of callers of pause("wait")
        self._loading = trio.Lock()  # weights arrive in the order they were asked for

    async def run(self) -> None:
        """Decode while there is work, sleep while there is none; return when it has died."""
        while self.scheduler.state != "dead":
            if self.scheduler.has_work:
                await self._decode()
            else:
                await self._work.wait()
                self._work = trio.Event()

    async def _decode(self) -> None:
        """Take steps on an absolute schedule until nothing is left to do.

        The schedule is absolute so that small delays are made up for and the rate is exact; after a
        stall longer than a step it starts anew, because a burst is nothing a real server does.
        """
        due = trio.current_time()
        while self.scheduler.has_work:
            due = max(due + self.token_time_s, trio.current_time())
            await trio.sleep_until(due)
            self.scheduler.step()
            self._settle()

    def generate(
        self,
        requests: SequenceOf[tuple[str, SequenceOf[int], SamplingParams]],
        *,
        streamed: bool = False,
    ) -> Generation:
        """Queue the sequences of one HTTP request: all of them, or none if one is refused.

        Args:
            requests: Id, prompt and parameters of each.
            streamed: Whether somebody reads them token by token.

        Raises:
            EngineDead: Nothing can be served any more.
            InvalidRequest: A prompt is refused.
        """
        generation = Generation(self, streamed=streamed)
        try:
            for request_id, token_ids, params in requests:
                generation.sequences.append(self._submit(generation, request_id, token_ids, params))
        except BaseException:
            self.discard(generation)
            raise
        if streamed:
            self._follow(generation)
        self._changed()
        return generation

    def _follow(self, generation: Generation) -> None:
        """Tell its hooks of each token when it is due; here they are made one by one anyway."""

    def _submit(
        self,
        generation: Generation,
        request_id: str,
        token_ids: SequenceOf[int],
        params: SamplingParams,
    ) -> Sequence:
        return self.scheduler.submit(
            request_id,
            token_ids,
            params,
            on_token=generation.on_token,
            on_finish=generation.on_finish,
        )

    def discard(self, generation: Generation) -> None:
        """Drop what is unfinished of it."""
        unfinished = [sequence for sequence in generation.sequences if not sequence.finished]
        for sequence in unfinished:
            self.scheduler.discard(sequence)
        if unfinished:
            self._changed()

    def abort(self, request_ids: SequenceOf[str] | None = None) -> int:
        """Finish sequences by id, or all; see ``Scheduler.abort``."""
        count = self.scheduler.abort(request_ids)
        self._changed()
        return count

    async def pause(self, mode: PauseMode) -> None:
        """Stop; in mode ``wait``, return when the running have finished or the pause was ended.

        Cancelling the call leaves the pause in force.
        """
        self.scheduler.pause(mode)
        self._changed()
        if self._draining:
            settled = trio.Event()
            self._settled[settled] = None
            try:
                await settled.wait()
            finally:
                del self._settled[settled]

    def resume(self) -> None:
        """Go on."""
        self.scheduler.resume()
        self._changed()

    def retract(self) -> None:
        """Put what runs back at the head of the queue; without a pause it gets its slots back."""
        self.scheduler.retract()
        self._changed()

    async def sleep(self) -> None:
        """Stop as for ``pause("abort")`` and let go of ``MEMORY``, unless the weights sleep."""
        if "weights" not in self.asleep:
            self.asleep.update(MEMORY)
        await self.pause("abort")

    def wake_up(self, tags: SequenceOf[str] | None = None) -> None:
        """Take some memory back, or all of it; with the last of it go on. Harmless when awake."""
        self.asleep.difference_update(MEMORY if tags is None else tags)
        if not self.asleep:
            self.resume()

    def die(self) -> None:
        """End for ever; ``run`` returns."""
        self.scheduler.die()
        self._changed()

    def set_version(self, label: str) -> None:
        """Label the weights in service."""
        self.scheduler.set_version(self.faults.label(label))

    async def reload(self, path: Path, version: str | None = None, *, fatal: bool) -> None:
        """Read weights in a thread and put them in service between two tokens.

        Args:
            path: Directory that holds them.
            version: Their label; None leaves the label.
            fatal: Whether a failure poisons the engine, as it does in vLLM.

        Raises:
            OSError: They cannot be read; the old weights stay (or the engine is poisoned).
            ValueError: They are not sound, or of another vocabulary; likewise.
            EngineDead: It is too late.
        """
        async with self._loading:
            try:
                self.faults.on_load()
                model = await self._read(path)
                self.scheduler.load_weights(model)
            except (OSError, ValueError):
                if fatal:
                    self.scheduler.poison()
                raise
            if version is not None:
                self.set_version(version)

    def now(self) -> float:
        """The time of what happens in the scheduler now, on trio's clock."""
        return trio.current_time()

    def unix_time(self) -> float:
        """Seconds since 1970. A subclass on a virtual clock has another opinion."""
        return time.time()

    async def _read(self, path: Path) -> Model:
        """Read weights. A subclass on a virtual clock reads without a thread."""
        return await trio.to_thread.run_sync(self._load_model, path)

    @property
    def _draining(self) -> bool:
        return self.scheduler.pause_mode == "wait" and bool(self.scheduler.running)

    def _changed(self) -> None:
        self._work.set()
        self._settle()

    def _settle(self) -> None:
        if not self._draining:
            for event in self._settled:
                event.set()
