# cython: cdivision=True
"""Least request, exactly: an indexed 4-ary heap over the servers that have a free slot.

The heap holds one 128-bit integer a server, most significant part first:

    load 40 bits = outstanding·2**40 // cap | tick 64 bits, of its last change | slot 24 bits

so that one unbranched comparison orders by load, then by how long ago the server last changed. Two
different loads differ by at least 1/(cap·cap'), which at caps up to 2**20 is at least one unit of
the 40 bits, and equal loads (2/4, 3/6) round down to the same one: the order is that of the exact
fractions. A full or draining server is not in the heap, so "all full" is an empty heap and a
saturated fleet costs next to nothing.

A lease is a number: 24 bits of index into a table of lease records, and above them the record's
generation, odd while held. Every acquire and every release adds one, so that a lease can be given
back once only, whatever else its server has in flight. The tables grow in `add` and `set_cap`
alone: the table of leases always has room for every free slot, so that `acquire` cannot fail.

Roads not taken. A ranked bucket queue is O(1), but must rank all fractions k/cap anew whenever a
cap not seen before appears, which is at each step of a slow start; this heap meets the same targets
(benchmarks/bench_selection.py) without. A release of the global interpreter lock around so few
nanoseconds costs more than the work.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from operator import index as _index

cdef extern from *:
    """
    typedef unsigned __int128 heap_entry;

    static inline heap_entry heap_entry_of(int64_t outstanding, int64_t cap, uint64_t tick, int32_t slot)
    {
        uint64_t load = ((uint64_t)outstanding << 40) / (uint64_t)cap;
        return ((heap_entry)load << 88) | ((heap_entry)tick << 24) | (heap_entry)(uint32_t)slot;
    }

    static inline int32_t heap_entry_slot(heap_entry entry) { return (int32_t)(entry & 0xFFFFFF); }
    """
    # Cython needs a known integer to stand for it; the C compiler sees the 128 bits.
    ctypedef unsigned long long heap_entry
    heap_entry heap_entry_of(int64_t outstanding, int64_t cap, uint64_t tick, int32_t slot) noexcept
    int32_t heap_entry_slot(heap_entry entry) noexcept

cdef enum:
    INDEX_BITS = 24
    INDEX_MASK = 0xFFFFFF
    SLOTS_MAX = 1 << 24
    LEASES_MAX = 1 << 24
    CAP_MAX = 1 << 20
    OUTSIDE = -1   # position of a server that is not in the heap; end of a list of the free
    REMOVED = -1   # cap of a server that left while leases of it are out
    VACANT = -2    # cap of a slot that no server has

cdef struct Server:
    int32_t position     # in the heap, or OUTSIDE; the next vacant slot while VACANT
    int32_t outstanding
    int32_t cap
    int32_t excluded     # set within acquire_excluding only

cdef struct Lease:
    uint32_t generation  # odd while held
    int32_t slot         # its server while held, else the next free lease


cdef int _grow(void **table, Py_ssize_t *room, Py_ssize_t needed, size_t size) except -1:
    """Make room for at least `needed` records, at least doubling, or raise and change nothing."""
    cdef Py_ssize_t wanted = max(needed, 2 * room[0], 8)
    cdef void *grown
    if needed <= room[0]:
        return 0
    grown = PyMem_Realloc(table[0], wanted * size)
    if grown is NULL:
        raise MemoryError
    table[0] = grown
    room[0] = wanted
    return 0


@cython.final
cdef class LeastRequestHeap:
    """Chooses the server with the least outstanding ÷ cap; among equals the longest unchanged one.

    Ties are therefore served in rotation, the same way on every run. Membership and caps change at
    any time. Every method is one uninterrupted section of C under the interpreter lock: safe from
    any thread, and a call that raises has changed nothing. `acquire` and `release` allocate nothing
    but the integer they return, in O(log servers).
    """

    cdef:
        heap_entry *_heap
        Server *_servers
        Lease *_leases
        Py_ssize_t _heap_room, _servers_room, _leases_room
        Py_ssize_t _ready         # servers in the heap
        Py_ssize_t _servers_used  # records ever handed out; those above are untouched memory
        Py_ssize_t _leases_used
        Py_ssize_t _present
        Py_ssize_t _orphans       # leases held on servers that were removed
        int32_t _vacant, _unheld  # heads of the lists of free records
        int64_t _outstanding, _free
        uint64_t _tick

    def __cinit__(self):
        self._vacant = OUTSIDE
        self._unheld = OUTSIDE

    def __dealloc__(self):
        PyMem_Free(self._heap)
        PyMem_Free(self._servers)
        PyMem_Free(self._leases)

    def add(self, int64_t cap):
        """Take a server in and return its slot, a small number that names it until `remove`.

        Args:
            cap: Requests it may run at once; 0 keeps it out of every choice.

        Raises:
            ValueError: If cap is not in 0 … 2**20.
            OverflowError: If all caps together pass 2**24 leases.
        """
        cdef int32_t slot = self._vacant
        _require_cap(cap)
        self._reserve(cap)
        if slot == OUTSIDE:
            slot = self._new_slot()
        else:
            self._vacant = self._servers[slot].position
        self._servers[slot] = Server(position=OUTSIDE, outstanding=0, cap=<int32_t> cap, excluded=0)
        self._present += 1
        self._free += cap
        self._settle(slot)
        return slot

    def set_cap(self, Py_ssize_t slot, int64_t cap):
        """Change a server's cap at once; what it has in flight stays, even above the new cap.

        Args:
            slot: From `add`.
            cap: 0 drains: never chosen again, and its leases come back as ever.

        Raises:
            IndexError: If no server has that slot.
            ValueError: If cap is not in 0 … 2**20.
            OverflowError: If all caps together pass 2**24 leases.
        """
        cdef Server *server = self._server(slot)
        cdef int64_t change
        _require_cap(cap)
        change = max(cap - server.outstanding, 0) - max(server.cap - server.outstanding, 0)
        self._reserve(change)
        server.cap = <int32_t> cap
        self._free += change
        self._settle(<int32_t> slot)

    def remove(self, Py_ssize_t slot):
        """Let a server go. Leases of it may still be released, to no effect.

        Raises:
            IndexError: If no server has that slot.
        """
        cdef Server *server = self._server(slot)
        self._free -= max(server.cap - server.outstanding, 0)
        self._outstanding -= server.outstanding
        self._orphans += server.outstanding
        self._present -= 1
        if server.position != OUTSIDE:
            self._take_out(server.position)
        server.cap = REMOVED
        if server.outstanding == 0:
            self._vacate(<int32_t> slot)

    def acquire(self):
        """Take a slot of the least loaded server and return the lease, or -1 if all are full."""
        if self._ready == 0:
            return -1
        return self._lease(heap_entry_slot(self._heap[0]))

    def acquire_on(self, Py_ssize_t slot):
        """Take a slot of this server and return the lease, or -1 if it is full or draining.

        Raises:
            IndexError: If no server has that slot.
        """
        if self._server(slot).position == OUTSIDE:
            return -1
        return self._lease(<int32_t> slot)

    def acquire_excluding(self, excluded):
        """Take a slot of the least loaded server not in `excluded`, or return -1 if there is none.

        The servers passed over keep their places. O((len(excluded) + passed over) · log servers).

        Args:
            excluded: Iterable of slots; one that no server has is ignored, as a waiter may well
                exclude a server that has left since.
        """
        # Everything that can run Python code happens here, before any state is looked at.
        cdef tuple slots = tuple(map(_index, excluded))
        cdef int32_t chosen
        self._mark(slots, 1)
        chosen = self._least_unmarked()
        self._mark(slots, 0)
        return -1 if chosen == OUTSIDE else self._lease(chosen)

    def release(self, int64_t lease):
        """Give a lease back and return its server's slot, or -1 if that server was removed.

        Raises:
            ValueError: If the lease is not held: never granted, or released before.
        """
        cdef int32_t slot = self._slot_held(lease)
        cdef Server *server = &self._servers[slot]
        cdef Lease *record = &self._leases[lease & INDEX_MASK]
        record.generation += 1
        record.slot = self._unheld
        self._unheld = <int32_t> (lease & INDEX_MASK)
        server.outstanding -= 1
        if server.cap == REMOVED:
            return self._release_orphan(slot)
        self._outstanding -= 1
        if server.outstanding < server.cap:
            self._free += 1
            self._settle(slot)
        return slot

    def slot_of(self, int64_t lease):
        """Return the slot of a held lease's server, or -1 if that server was removed.

        Raises:
            ValueError: If the lease is not held.
        """
        cdef int32_t slot = self._slot_held(lease)
        return -1 if self._servers[slot].cap == REMOVED else slot

    def outstanding(self, Py_ssize_t slot):
        """Return how many leases of this server are held. IndexError if no server has that slot."""
        return self._server(slot).outstanding

    def cap(self, Py_ssize_t slot):
        """Return this server's cap. IndexError if no server has that slot."""
        return self._server(slot).cap

    @property
    def total_outstanding(self):
        """Leases held, over all servers present."""
        return self._outstanding

    @property
    def free(self):
        """Leases that could be taken now: the sum of max(cap - outstanding, 0)."""
        return self._free

    def __len__(self):
        return self._present

    def __repr__(self):
        return (f"<LeastRequestHeap [Servers: {self._present}, {self._ready} ready | "
                f"Leases: {self._outstanding} held, {self._free} free]>")

    # ---- leases

    cdef inline int64_t _lease(self, int32_t slot) noexcept:
        """Grant a lease of a server that is in the heap."""
        cdef Server *server = &self._servers[slot]
        cdef int32_t index = self._unheld
        cdef Lease *record
        if index == OUTSIDE:
            index = <int32_t> self._leases_used
            self._leases_used += 1
            self._leases[index].generation = 0
        else:
            self._unheld = self._leases[index].slot
        record = &self._leases[index]
        record.generation += 1
        record.slot = slot
        server.outstanding += 1
        self._outstanding += 1
        self._free -= 1
        self._settle(slot)
        return (<int64_t> record.generation << INDEX_BITS) | index

    cdef inline int32_t _slot_held(self, int64_t lease) except -1:
        cdef int64_t index = lease & INDEX_MASK
        cdef int64_t generation = lease >> INDEX_BITS
        if (lease < 0 or index >= self._leases_used or not generation & 1
                or self._leases[index].generation != generation):
            raise ValueError(f"lease {lease} is not held: it was released before, or never granted")
        return self._leases[index].slot

    cdef int32_t _release_orphan(self, int32_t slot) noexcept:
        self._orphans -= 1
        if self._servers[slot].outstanding == 0:
            self._vacate(slot)
        return -1

    cdef int _reserve(self, int64_t more) except -1:
        """Make room for the leases held and every slot free, once `more` become free."""
        cdef int64_t needed = self._outstanding + self._orphans + self._free + more
        if needed > LEASES_MAX:
            raise OverflowError(f"the caps add up to {needed} leases; at most {LEASES_MAX} can be held")
        return _grow(<void **> &self._leases, &self._leases_room, needed, sizeof(Lease))

    # ---- servers

    cdef inline Server *_server(self, Py_ssize_t slot) except NULL:
        if slot < 0 or slot >= self._servers_used or self._servers[slot].cap < 0:
            raise IndexError(f"no server has slot {slot}")
        return &self._servers[slot]

    cdef int32_t _new_slot(self) except -1:
        cdef Py_ssize_t needed = self._servers_used + 1
        if needed > SLOTS_MAX:
            raise OverflowError(f"at most {SLOTS_MAX} servers can be present")
        _grow(<void **> &self._heap, &self._heap_room, needed, sizeof(heap_entry))
        _grow(<void **> &self._servers, &self._servers_room, needed, sizeof(Server))
        self._servers_used = needed
        return <int32_t> (needed - 1)

    cdef void _vacate(self, int32_t slot) noexcept:
        self._servers[slot].cap = VACANT
        self._servers[slot].position = self._vacant
        self._vacant = slot

    cdef void _mark(self, tuple slots, int32_t mark) except *:
        for slot in slots:
            if 0 <= slot < self._servers_used:
                self._servers[<Py_ssize_t> slot].excluded = mark

    cdef int32_t _least_unmarked(self) noexcept:
        """Pop marked servers off the top until an unmarked one shows; then put them back."""
        cdef Py_ssize_t ready = self._ready
        cdef int32_t found = OUTSIDE
        cdef heap_entry top
        while self._ready and found == OUTSIDE:
            top = self._heap[0]
            if self._servers[heap_entry_slot(top)].excluded:
                self._take_out(0)
                self._heap[self._ready] = top  # the place that the shrinking heap has just left
            else:
                found = heap_entry_slot(top)
        while self._ready < ready:
            self._ready += 1
            self._sift_up(self._ready - 1, self._heap[self._ready - 1])
        return found

    # ---- the heap

    cdef inline void _settle(self, int32_t slot) noexcept:
        """Bring a server whose count or cap changed to its place in the heap, or out of it."""
        cdef Server *server = &self._servers[slot]
        cdef Py_ssize_t place = server.position
        cdef heap_entry entry
        if server.outstanding >= server.cap:
            if place != OUTSIDE:
                self._take_out(place)
            return
        self._tick += 1
        entry = heap_entry_of(server.outstanding, server.cap, self._tick, slot)
        if place == OUTSIDE:
            place = self._ready
            self._ready += 1
            self._sift_up(place, entry)
        elif entry < self._heap[place]:
            self._sift_up(place, entry)
        else:
            self._sift_down(place, entry)

    cdef inline void _take_out(self, Py_ssize_t place) noexcept:
        """Take the entry at `place` out, and let the last one take its room."""
        cdef heap_entry gone = self._heap[place]
        cdef heap_entry last
        self._servers[heap_entry_slot(gone)].position = OUTSIDE
        self._ready -= 1
        if place == self._ready:
            return
        last = self._heap[self._ready]
        if last < gone:
            self._sift_up(place, last)
        else:
            self._sift_down(place, last)

    cdef inline void _put(self, Py_ssize_t place, heap_entry entry) noexcept:
        self._heap[place] = entry
        self._servers[heap_entry_slot(entry)].position = <int32_t> place

    cdef inline void _sift_up(self, Py_ssize_t place, heap_entry entry) noexcept:
        cdef Py_ssize_t parent
        while place > 0:
            parent = (place - 1) >> 2
            if self._heap[parent] < entry:
                break
            self._put(place, self._heap[parent])
            place = parent
        self._put(place, entry)

    cdef inline void _sift_down(self, Py_ssize_t place, heap_entry entry) noexcept:
        cdef Py_ssize_t child = 4 * place + 1
        while child < self._ready:
            child = self._least_of_four(child)
            if entry < self._heap[child]:
                break
            self._put(place, self._heap[child])
            place = child
            child = 4 * place + 1
        self._put(place, entry)

    cdef inline Py_ssize_t _least_of_four(self, Py_ssize_t first) noexcept:
        """The least of up to four siblings; two independent comparisons, then one."""
        cdef heap_entry *heap = self._heap
        cdef Py_ssize_t least = first, other = first + 2
        if first + 3 < self._ready:
            least += heap[first + 1] < heap[first]
            other += heap[first + 3] < heap[first + 2]
            return other if heap[other] < heap[least] else least
        for other in range(first + 1, self._ready):
            if heap[other] < heap[least]:
                least = other
        return least

    # ---- invariants

    def _check(self):
        """Walk everything and assert every invariant; for tests, O(servers + leases)."""
        held = self._check_leases()
        cdef int64_t outstanding = 0, free = 0
        cdef Py_ssize_t present = 0, ready = 0, orphans = 0, slot
        cdef Server *server
        for slot in range(self._servers_used):
            server = &self._servers[slot]
            assert server.excluded == 0
            assert server.outstanding == held.get(slot, 0)
            if server.cap >= 0:
                present += 1
                outstanding += server.outstanding
                free += max(server.cap - server.outstanding, 0)
                ready += server.outstanding < server.cap
                assert (server.position != OUTSIDE) == (server.outstanding < server.cap)
            else:
                assert (server.cap == REMOVED) == (server.outstanding > 0)
                orphans += server.outstanding
        assert (present, ready, orphans) == (self._present, self._ready, self._orphans)
        assert (outstanding, free) == (self._outstanding, self._free)
        self._check_heap()

    cdef dict _check_leases(self):
        cdef Py_ssize_t index, held = 0, unheld = 0
        cdef int32_t link = self._unheld
        cdef dict by_slot = {}
        for index in range(self._leases_used):
            if self._leases[index].generation & 1:
                held += 1
                slot = self._leases[index].slot
                by_slot[slot] = by_slot.get(slot, 0) + 1
        while link != OUTSIDE:
            assert not self._leases[link].generation & 1
            unheld += 1
            link = self._leases[link].slot
        assert held + unheld == self._leases_used <= self._leases_room
        assert held == self._outstanding + self._orphans
        assert held + self._free <= self._leases_room
        return by_slot

    cdef int _check_heap(self) except -1:
        cdef Py_ssize_t place
        cdef Server *server
        cdef int32_t slot
        for place in range(self._ready):
            slot = heap_entry_slot(self._heap[place])
            server = &self._servers[slot]
            assert server.position == place
            assert (self._heap[place] >> 88) == (<uint64_t> server.outstanding << 40) // server.cap
            assert place == 0 or self._heap[(place - 1) >> 2] < self._heap[place]
        return 0


cdef inline int _require_cap(int64_t cap) except -1:
    if cap < 0 or cap > CAP_MAX:
        raise ValueError(f"a server's cap must be in 0 … {CAP_MAX}, not {cap}")
    return 0
