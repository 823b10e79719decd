"""The pool against lists: same connections handed out, same ones closed, after any history."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arealtrio.transport.origin import Origin
from arealtrio.transport.pool import Pool

KEEP_ALIVE_S = 10.0
PER_ORIGIN = 3


class FakeConnection:
    """What the pool asks of a connection, without one."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.closed = False
        self.quiet = True

    def is_quiet(self) -> bool:
        return self.quiet

    def close(self) -> None:
        self.closed = True


class PoolMachine(RuleBasedStateMachine):
    """The model: one list of idle connections per origin, oldest first, and one of active ones."""

    @initialize()
    def start(self) -> None:
        self.pool = Pool(KEEP_ALIVE_S, PER_ORIGIN)
        self.origins = [Origin(f"http://s{number}") for number in range(2)]
        self.idle: dict[Origin, list[Any]] = {origin: [] for origin in self.origins}
        self.active: list[Any] = []
        self.now = 0.0

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=st.integers(0, 1))
    def take(self, which: int) -> None:
        origin = self.origins[which]
        usable = [one for one in self.idle[origin] if self.alive(one)]
        taken = self.pool.take(origin, self.now)
        if not usable:
            assert taken is None
            self.idle[origin].clear()
            fresh: Any = FakeConnection(origin)
            self.pool.add(fresh)
            self.active.append(fresh)
            return
        assert taken is usable[-1], "not the one used last"
        passed_over = self.idle[origin][self.idle[origin].index(usable[-1]) :]
        assert all(one.closed for one in passed_over[1:])
        del self.idle[origin][-len(passed_over) :]
        self.active.append(usable[-1])

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.active))
        self.pool.put(connection, self.now)
        self.active.remove(connection)
        kept = self.idle[connection.origin]
        kept.append(connection)
        if len(kept) > PER_ORIGIN:
            assert kept.pop(0).closed
        # Which too-old ones are swept now and which later is the pool's own affair.
        for origin, idle in self.idle.items():
            self.idle[origin] = [one for one in idle if not (one.closed and self.old(one))]

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.active))
        self.pool.discard(connection)
        self.active.remove(connection)
        assert connection.closed

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A server closes a connection that is kept."""
        kept = [one for idle in self.idle.values() for one in idle]
        if kept:
            data.draw(st.sampled_from(kept)).quiet = False

    @rule()
    def close(self) -> None:
        self.pool.close()
        assert all(one.closed for idle in self.idle.values() for one in idle)
        assert all(one.closed for one in self.active)
        for idle in self.idle.values():
            idle.clear()
        self.active.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool._check()
        assert self.pool.active_count == len(self.active)
        assert self.pool.idle_count == sum(len(idle) for idle in self.idle.values())
        assert not any(one.closed for one in self.active)
        assert not any(one.closed for idle in self.idle.values() for one in idle)

    def old(self, connection: FakeConnection) -> bool:
        return self.now - connection.idle_since >= KEEP_ALIVE_S

    def alive(self, connection: FakeConnection) -> bool:
        return connection.quiet and not self.old(connection)


TestPool = PoolMachine.TestCase
