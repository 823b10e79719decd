"""LeastRequestHeap against a scan, whatever happens in whatever order."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from arealtrio._core.heap import LeastRequestHeap

from ..models.heap import ScanModel

caps = st.integers(0, 6) | st.sampled_from([0, 8, 64, 2**20])
far_slots = st.sampled_from([-1, -(2**40), 10**6, 2**31, 2**32, 2**40])
far_leases = st.sampled_from([-1, 0, 1, 2**24, 2**24 - 1, 2**56, 2**62, -(2**62)])


class HeapMachine(RuleBasedStateMachine):
    servers = Bundle("servers")  # names of the model: a real slot may name two servers, in turn
    gone = Bundle("gone")
    leases = Bundle("leases")
    spent = Bundle("spent")

    @initialize()
    def start(self) -> None:
        self.heap = LeastRequestHeap()
        self.model = ScanModel()
        self.slots: dict[str, int] = {}
        self.added = 0

    @rule(target=servers, cap=caps)
    def add(self, cap: int) -> str:
        name = f"server-{self.added}"
        self.added += 1
        slot = self.heap.add(cap)
        assert slot not in self.slots.values()
        self.slots[name] = slot
        self.model.add(name, cap)
        return name

    @rule(name=servers, cap=caps)
    def set_cap(self, name: str, cap: int) -> None:
        self.heap.set_cap(self.slots[name], cap)
        self.model.set_cap(name, cap)

    @rule(target=gone, name=consumes(servers))
    def remove(self, name: str) -> int:
        slot = self.slots.pop(name)
        self.heap.remove(slot)
        self.model.remove(name)
        return slot

    @rule(target=leases)
    def acquire(self) -> object:
        return self.granted(self.heap.acquire(), self.model.choose())

    @rule(target=leases, times=st.integers(2, 12))
    def acquire_many(self, times: int) -> object:
        for _ in range(times - 1):
            self.acquire()
        return self.acquire()

    @rule(target=leases, name=servers)
    def acquire_on(self, name: str) -> object:
        lease = self.heap.acquire_on(self.slots[name])
        return self.granted(lease, name if self.model.servers[name].free else None)

    @rule(target=leases, data=st.data())
    def acquire_excluding(self, data: st.DataObject) -> object:
        excluded = data.draw(st.lists(st.sampled_from(sorted(self.slots)))) if self.slots else []
        slots = [self.slots[name] for name in excluded]
        lease = self.heap.acquire_excluding([*slots, -1, 2**70])
        return self.granted(lease, self.model.choose(excluded))

    def granted(self, lease: int, expected: str | None) -> object:
        if expected is None:
            assert lease == -1
            return multiple()
        assert self.heap.slot_of(lease) == self.slots[expected]
        self.model.take(expected, lease)
        return lease

    @rule(target=spent, lease=consumes(leases))
    def release(self, lease: int) -> int:
        server = self.model.leases[lease]
        present = self.model.release(lease)
        names = [name for name, other in self.model.servers.items() if other is server]
        assert self.heap.release(lease) == (self.slots[names[0]] if present else -1)
        return lease

    @rule(lease=spent | far_leases)
    def release_what_is_not_held(self, lease: int) -> None:
        if lease not in self.model.leases:
            before = repr(self.heap)
            with pytest.raises(ValueError, match="not held"):
                self.heap.release(lease)
            with pytest.raises(ValueError, match="not held"):
                self.heap.slot_of(lease)
            assert repr(self.heap) == before

    @rule(slot=gone | far_slots)
    def use_a_slot_that_no_server_has(self, slot: int) -> None:
        if slot not in self.slots.values():
            calls = (self.heap.remove, self.heap.acquire_on, self.heap.outstanding, self.heap.cap)
            for call in calls:
                with pytest.raises(IndexError, match="no server has slot"):
                    call(slot)
            with pytest.raises(IndexError, match="no server has slot"):
                self.heap.set_cap(slot, 1)

    @rule(name=servers, cap=st.sampled_from([-1, 2**20 + 1, 2**40, -(2**40)]))
    def cap_out_of_range(self, name: str, cap: int) -> None:
        with pytest.raises(ValueError, match="cap must be in"):
            self.heap.set_cap(self.slots[name], cap)
        with pytest.raises(ValueError, match="cap must be in"):
            self.heap.add(cap)

    @invariant()
    def agrees(self) -> None:
        self.heap._check()
        assert len(self.heap) == len(self.model.servers)
        assert self.heap.total_outstanding == self.model.total_outstanding
        assert self.heap.free == self.model.free
        for name, server in self.model.servers.items():
            assert self.heap.cap(self.slots[name]) == server.cap
            assert self.heap.outstanding(self.slots[name]) == server.outstanding


TestHeap = HeapMachine.TestCase
