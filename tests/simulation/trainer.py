"""Trainer: takes batches, trains, updates the weights, evaluates; dies now and then."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import trio

from arealtrio import (
    Batch,
    NoServerAvailable,
    RolloutConfig,
    RolloutResult,
    StalenessBudgetExhausted,
    TooManyFailures,
    UsageError,
    WeightUpdate,
    WeightUpdateError,
    WorkflowExecutor,
    open_executor,
)
from arealtrio.testing import ServerCondition, SimulatedFleet, checkpoint
from arealtrio.types import PauseMode

from . import invariants as hold
from .history import History
from .plan import LORA, PAUSES, Plan
from .watch import Sight, Watch
from .wire import WatchedTransport
from .workload import Loader, Workload, prompt

SETTLED = ("delivered", "discarded", "rejected", "failed", "expired")
ADAPTER_PATH = os.sep  # of an adapter only the name matters, but it must exist everywhere
RETRY_S = 1.0  # until the trainer tries again what the fleet did not let it do
REFUSALS_BESIDE = 10
"""Batches refused in a row until what runs beside leaves the budget to the trainer."""


class TrainerDied(Exception):
    """How a trainer dies that is not cancelled."""


class Trainer:
    """One training run, over as many executors as it has lives.

    Args:
        history: Of the run.
        fleet: Its servers.
        sight: Shows each executor to whoever checks.
    """

    def __init__(self, history: History, fleet: SimulatedFleet, sight: Sight) -> None:
        self.history = history
        self.plan: Plan = history.plan
        self.fleet = fleet
        self.version = 0
        self.executor: WorkflowExecutor | None = None
        self.watch: Watch | None = None
        self._sight = sight
        self._wire = WatchedTransport(fleet, history)
        self._rng = random.Random(f"trainer {self.plan.seed}")
        self._addresses = list(fleet.addresses[: self.plan.first])
        self._crashes = list(self.plan.crashes)
        self._epochs = [
            [f"{epoch}-{number}" for number in range(self.plan.prompts)]
            for epoch in range(self.plan.epochs)
        ]
        self._extra = 0  # prompts that no epoch has

    @property
    def state(self) -> str:
        """Where it is, for whoever wonders why it does not end."""
        if self.executor is None:
            return "no executor is open"
        return f"{self.executor.status()}\n{self.executor.engine.pool!r}"

    async def run(self) -> None:
        """Train to the end, through all lives."""
        while self._epochs:
            self.history.lives += 1
            try:
                await self._live()
            except* TrainerDied:
                self.history.note("the trainer died")

    # --- one life --------------------------------------------------------------------------------

    async def _live(self) -> None:
        life = trio.CancelScope()
        try:
            with life:
                async with self._open() as executor:
                    self._begin(executor)
                    await self._recover()
                    await self._train_beside_others(life)
        except NoServerAvailable:
            if not self.plan.faulty or self.executor is not None:
                raise
            await trio.sleep(RETRY_S)
        finally:
            self._end()

    def _open(self) -> AbstractAsyncContextManager[WorkflowExecutor]:
        for server in self.fleet:
            if server.asleep:  # the life before could not wake it, and said so
                server.restart()
        up = [s.address for s in self.fleet if s.condition is ServerCondition.UP]
        reachable = [address for address in self._addresses if address in up]
        if not reachable:  # nothing can be opened before one is; the rest comes back by itself
            self.fleet.servers[0].restart()
            reachable = [self.fleet.servers[0].address]
        config = RolloutConfig(servers=reachable, **self.plan.config)
        return open_executor(config, transport=self._wire)

    def _begin(self, executor: WorkflowExecutor) -> None:
        self.executor = executor
        self.watch = self._sight.watch = Watch(self.history, executor, self.fleet)
        self._workload = Workload(self.plan, self.watch, self._rng)
        self._finished = trio.Event()
        self._beside = 0
        self._served = trio.Event()
        self._served.set()
        for address in self._addresses:
            if address not in executor.config.servers:
                executor.add_server(address)

    def _end(self) -> None:
        executor, watch = self.executor, self.watch
        self.executor = self.watch = self._sight.watch = None
        if executor is None or watch is None:
            return
        leaving = ("draining", "gone")
        pool = executor.engine.pool
        self._addresses = [s.address for s in pool.servers if s.state.value not in leaving]
        watch.close()
        self._wire.closed()
        self._keep_what_is_left(watch)

    def _keep_what_is_left(self, watch: Watch) -> None:
        """What was neither trained on nor found wanting is read again in the next life."""
        done = {watch.prompts[task] for task, state in watch.states.items() if state in SETTLED}
        left = [[name for name in epoch if name not in done] for epoch in self._epochs]
        self._epochs = [epoch for epoch in left if epoch]

    async def _recover(self) -> None:
        """Go on from the version before; an adapter has to be there before the first request."""
        assert self.executor is not None
        assert self.watch is not None
        if self.history.lives == 1 and self.plan.update != "lora":
            return
        update = self._update_to(self.version)
        await self._until_servers_take(lambda: self._executor.recover(self.version, update))
        self.watch.recovered = self.version * self._executor.config.consumer_batch_size

    @property
    def _speaks_sglang(self) -> bool:
        return self.plan.dialect == "sglang"

    @property
    def _executor(self) -> WorkflowExecutor:
        assert self.executor is not None
        return self.executor

    @property
    def _watch(self) -> Watch:
        assert self.watch is not None
        return self.watch

    async def _until_servers_take(self, update: Callable[[], Awaitable[Any]]) -> None:
        while True:
            try:
                await update()
            except WeightUpdateError as exc:
                if not self.plan.faulty and not self.plan.changes:
                    raise
                self.history.note(f"no server took the update: {exc}")
                await trio.sleep(RETRY_S)
            else:
                return

    async def _train_beside_others(self, life: trio.CancelScope) -> None:
        async with trio.open_nursery() as nursery:
            if self._crashes:
                nursery.start_soon(self._crash, life)
            if self.plan.evaluations:
                nursery.start_soon(self._run_beside, self._evaluate)
            if self.plan.offline:
                nursery.start_soon(self._run_beside, self._run_offline)
            await self._train()
            nursery.cancel_scope.cancel()

    async def _crash(self, life: trio.CancelScope) -> None:
        at_s, kind = self._crashes[0]
        await trio.sleep_until(at_s)
        del self._crashes[0]
        self.history.fault("crash", f"the trainer is to die: {kind}")
        if kind == "raises":
            raise TrainerDied
        life.cancel()

    async def _run_beside(self, function: Callable[[], Awaitable[None]]) -> None:
        self._beside += 1
        await function()
        self._beside -= 1

    # --- training --------------------------------------------------------------------------------

    async def _train(self) -> None:
        while self._epochs:
            await self._read(self._epochs[0])
            del self._epochs[0]
        self._finished.set()
        while self._beside:  # what runs beside may need the versions to go on
            await trio.sleep(RETRY_S)
            await self._update()
        await self._hear_the_last_news()

    async def _read(self, names: Sequence[str]) -> None:
        loader = Loader(names, self.plan.read_at_once)
        while (batch := await self._next_batch(loader, len(names))) is not None:
            await trio.sleep(self.plan.training_s)
            if self._rng.random() >= self.plan.oddity:
                await self._update()
            else:
                await self._do_something_odd()
            self.history.note(f"trained {len(batch)} groups in version {batch.version}")
        self._check_epoch(loader)

    def _check_epoch(self, loader: Loader) -> None:
        """What became too old at the end is reported with the next batch: here it is accepted."""
        watch, read = self._watch, set(loader.read)
        of_the_epoch = [
            task for task, name in watch.prompts.items() if name in read and task in watch.states
        ]
        accounted = Counter(watch.prompts[task] for task in of_the_epoch)
        self.history.check(hold.i7_every_prompt, Counter(loader.read), accounted)

    async def _hear_the_last_news(self) -> None:
        """Batches tell what failed or became too old since the one before; so ask for another."""
        executor, watch = self._executor, self._watch
        loader = Loader([self._name()], 0)
        while await self._next_batch(loader, 1) is None:
            await self._update()
            loader = Loader([self._name()], 0)
        while await self._next_batch(loader, 1) is not None:
            pass
        self.history.check(hold.i7_none_lost, watch.undelivered())
        self.history.check(watch.all_came)
        self.history.check(hold.i1_all_settled, executor.counts.as_dict())

    async def _next_batch(self, loader: Loader, prompts: int) -> Batch | None:
        """The next batch; None at the epoch's end."""
        try:
            return await self._batch_within(loader, prompts)
        finally:
            self._served.set()

    async def _batch_within(self, loader: Loader, prompts: int) -> Batch | None:
        refusals = 0
        while True:
            try:
                batch = await self._ask_for_a_batch(loader)
            except StopAsyncIteration:
                return None
            except TooManyFailures as exc:  # its budgets are without end: there was no batch at all
                self.history.note(str(exc))
                return None
            except StalenessBudgetExhausted:
                refusals += 1
                if refusals == REFUSALS_BESIDE:
                    self._served = trio.Event()
                self._check_exhausted()
                self.history.check(hold.liveness_of_updates, refusals, self.state)
                await self._update()
                continue
            if batch is not None:
                short = self.plan.dynamic or len(loader.read) == prompts
                self._watch.batch_came(batch, short=short)
                return batch

    async def _ask_for_a_batch(self, loader: Loader) -> Batch | None:
        """Ask, and now and then give up; what was not taken then must come with the next."""
        patience_s = self._rng.uniform(0, 3) if self._rng.random() < self.plan.oddity / 2 else None
        watch = self._watch
        with trio.move_on_after(patience_s if patience_s is not None else float("inf")):
            watch.trainer_waits = True
            try:
                return await self._executor.prepare_batch(
                    loader,
                    self._workload,
                    should_accept_fn=self._workload.should_accept,
                    group_size=self.plan.group_size,
                    group_policy=self.plan.group_policy,
                    dynamic_batch_size=self.plan.dynamic,
                )
            finally:
                watch.trainer_waits = False
        return None

    def _check_exhausted(self) -> None:
        """Since it was refused, in this instant, another may have given budget back and begun."""
        executor, now = self._executor, trio.current_time()
        running = [
            group
            for group in executor._live.values()
            if group.permit is not None and any(one.started < now for one in group.running.values())
        ]
        self.history.note("the staleness budget is exhausted")
        capacity = executor.get_capacity()
        self.history.check(hold.exhausted_for_a_reason, len(running), capacity)

    async def _do_something_odd(self) -> None:
        ways = [self._twice, self._not_at_all, self._draining, self._held]
        # A server that did not confirm that it woke needs its base weights again, and where only
        # adapters were loaded nobody can give it those: it stays out until it is restarted.
        # No SGLang server has them after its sleep.
        forgetful = self.plan.faulty or self._speaks_sglang
        if self.plan.update != "lora" or not forgetful:
            ways.append(self._asleep)
        odd = self._rng.choice(ways)
        self.history.note(f"the trainer is odd: {odd.__name__.strip('_')}")
        await odd()

    async def _twice(self) -> None:
        await self._update()
        await self._update()

    async def _not_at_all(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _draining(self) -> None:
        self._executor.pause()
        with suppress(TimeoutError):
            await self._executor.drain(timeout_s=self._rng.choice((0.5, 20.0)))
        await self._update()
        self._executor.resume()

    async def _held(self) -> None:
        modes: tuple[PauseMode, ...] = ("keep", "abort")
        if self._speaks_sglang:
            modes = (*modes, "in_place")
        async with self._executor.engine.paused(self._rng.choice(modes)):
            await trio.sleep(self.plan.training_s)
        await self._update()

    async def _asleep(self) -> None:
        async with self._executor.offloaded(drain=self._rng.random() < 0.5):
            await trio.sleep(self.plan.training_s)
        await self._update()

    async def _update(self) -> None:
        version = self.version + 1
        update = self._update_to(version)
        await self._until_servers_take(lambda: self._executor.update_weights(update))
        self.version = version

    def _update_to(self, version: int) -> WeightUpdate:
        kind, pause = self.plan.update, self.plan.pause
        if kind == "lora":
            return WeightUpdate.lora(LORA, ADAPTER_PATH, version)
        rolling = kind == "rolling"
        if kind == "mixed":
            rolling = self._rng.random() < 0.5
            pause = self._rng.choice(PAUSES[self.plan.dialect])
        return WeightUpdate.from_disk(
            checkpoint(version),
            version,
            pause=pause,
            rolling=rolling,
        )

    # --- beside training -------------------------------------------------------------------------

    async def _evaluate(self) -> None:
        while not self._finished.is_set():
            ids = [self._submit(is_eval=True) for _ in range(self.plan.evaluations)]
            await self._take([task for task in ids if task is not None], is_eval=True)
            await trio.sleep(self._rng.uniform(0, 5))

    async def _run_offline(self) -> None:
        """Where a version's budget is one batch, this can take its part of each, time and again."""
        while not self._finished.is_set():
            if not self._served.is_set():
                await self._served.wait()
            if self._rng.random() < 0.3:
                await self._run_a_batch()
            else:
                ids = [self._submit(is_eval=False) for _ in range(self.plan.offline)]
                await self._take([task for task in ids if task is not None], is_eval=False)
            await trio.sleep(self._rng.uniform(0, 5))

    def _name(self) -> str:
        self._extra += 1
        return f"extra-{self._extra}"

    def _submit(self, *, is_eval: bool) -> str | None:
        """Submit one; None where the queue is full."""
        try:
            return self._executor.submit(
                prompt(self._name()),
                self._workload,
                should_accept_fn=self._workload.should_accept,
                is_eval=is_eval,
                group_size=self.plan.group_size,
            )
        except UsageError:
            if is_eval:
                raise
            return None

    async def _take(self, ids: list[str], *, is_eval: bool) -> None:
        """Take the results of these, in one of the ways there are."""
        left = ids
        while left:
            try:
                results = await self._wait(left, is_eval=is_eval)
            except TimeoutError:
                continue
            except StalenessBudgetExhausted:
                self._check_exhausted()
                await trio.sleep(RETRY_S)
                continue
            self._watch.results_came(results, is_eval=is_eval)
            taken = {result.task_id for result in results}
            left = [task for task in left if task not in taken]

    async def _wait(self, ids: list[str], *, is_eval: bool) -> list[RolloutResult]:
        executor, way = self._executor, self._rng.randrange(3)
        if way == 0:
            return [await executor.wait_for_task(self._rng.choice(ids))]
        timeout_s = self._rng.uniform(0, 5) if way == 1 else None
        return await executor.wait(self._rng.randint(1, len(ids)), timeout_s, is_eval=is_eval)

    async def _run_a_batch(self) -> None:
        names = [self._name() for _ in range(self.plan.offline)]
        try:
            batch = await self._executor.rollout_batch(
                [prompt(name) for name in names],
                self._workload,
                should_accept_fn=self._workload.should_accept,
                group_size=self.plan.group_size,
            )
        except StalenessBudgetExhausted:
            self._watch.thrown_away(names)
            self._check_exhausted()
            return
        with self.history.checking():
            self._watch.groups_came(batch.groups, batch.version)
            self._watch.failures_came(batch.failures)
            told = [g.prompt_id for g in batch.groups] + [f.prompt_id for f in batch.failures]
            hold.i7_every_prompt(Counter(names), Counter(told))
