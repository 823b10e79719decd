"""Staleness accounting in one 64-bit word, so that checking and reserving are one step.

    free  24 bits, biased by 2**23 | slack 40 bits, biased by 2**39

    free  = max_concurrent - running
    slack = (max_staleness + version + 1)·batch - (accepted + running) - charged

The capacity, AReaL's `get_capacity`, is min(free, slack) of one load. Every change is a
compare-and-swap on the word, so a reservation that two threads try at once is granted to as many as
there is room for, with or without an interpreter lock. The statistics stand beside the word for
whoever asks; no decision reads them, and `_check` asserts that they and the word agree.

Roads not taken: a lock around plain integers costs ten times as much from one thread and more from
several (benchmarks/bench_counters.py); letting go of the interpreter lock for so short a section
costs more than the section.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <stdatomic.h>

    #define COUNTERS_SLACK_BITS 40
    #define COUNTERS_SLACK_MASK ((UINT64_C(1) << 40) - 1)
    #define COUNTERS_SLACK_BIAS (INT64_C(1) << 39)
    #define COUNTERS_FREE_BIAS (INT64_C(1) << 23)

    typedef _Atomic uint64_t counters_word;

    static inline uint64_t counters_load(counters_word *word)
    {
        return atomic_load_explicit(word, memory_order_acquire);
    }

    static inline int counters_swap(counters_word *word, uint64_t *seen, uint64_t wanted)
    {
        return atomic_compare_exchange_weak_explicit(word, seen, wanted, memory_order_acq_rel, memory_order_acquire);
    }

    static inline void counters_store(counters_word *word, uint64_t value)
    {
        atomic_store_explicit(word, value, memory_order_release);
    }
    """
    const int SLACK_BITS "COUNTERS_SLACK_BITS"
    const uint64_t SLACK_MASK "COUNTERS_SLACK_MASK"
    const int64_t SLACK_BIAS "COUNTERS_SLACK_BIAS"
    const int64_t FREE_BIAS "COUNTERS_FREE_BIAS"
    ctypedef uint64_t counters_word
    uint64_t counters_load(counters_word *word) noexcept
    bint counters_swap(counters_word *word, uint64_t *seen, uint64_t wanted) noexcept
    void counters_store(counters_word *word, uint64_t value) noexcept

cdef struct Limits:
    int64_t max_concurrent  # as given; the formula takes at least 1 of this
    int64_t batch           # and of this
    int64_t max_staleness


cdef inline int64_t _free_of(uint64_t word) noexcept:
    return <int64_t> (word >> SLACK_BITS) - FREE_BIAS

cdef inline int64_t _slack_of(uint64_t word) noexcept:
    return <int64_t> (word & SLACK_MASK) - SLACK_BIAS

cdef inline bint _fits(int64_t free, int64_t slack) noexcept:
    return -FREE_BIAS <= free < FREE_BIAS and -SLACK_BIAS <= slack < SLACK_BIAS

cdef inline uint64_t _pack(int64_t free, int64_t slack) noexcept:
    return <uint64_t> (free + FREE_BIAS) << SLACK_BITS | <uint64_t> (slack + SLACK_BIAS)


@cython.final
cdef class StalenessCounters:
    """How many rollouts may still start: AReaL's staleness formula, counted exactly.

    capacity = min(max_concurrent - running,
                   (max_staleness + version + 1)·batch - (accepted + running) - charged)

    Capacity and counts may go below zero, as AReaL's do: only `try_submit` and `grant` look before
    they count. Every method is atomic and safe from any thread. What would leave the word's range
    (running beyond ±2**23 of the limit, the budget beyond ±2**39) raises OverflowError and changes
    nothing.

    Args:
        max_concurrent: Rollouts running at once; below 1 counts as 1.
        batch: Accepted rollouts that one version consumes; below 1 counts as 1.
        max_staleness: Versions that a rollout may be behind when it is consumed.
        version: The weight version to start from.
    """

    cdef:
        counters_word _word
        Limits _limits
        int64_t _version, _accepted, _enqueued, _rejected, _running, _charged, _granted

    def __cinit__(self, int64_t max_concurrent, int64_t batch, int64_t max_staleness, int64_t version=0):
        self._rebuild(Limits(max_concurrent, batch, max_staleness), version, 0, 0)

    # ---- reading

    @property
    def capacity(self):
        """Rollouts that may still start now: one load. May be negative."""
        cdef uint64_t word = counters_load(&self._word)
        return min(_free_of(word), _slack_of(word))

    @property
    def free(self):
        """max_concurrent - running."""
        return _free_of(counters_load(&self._word))

    @property
    def slack(self):
        """(max_staleness + version + 1)·batch - (accepted + running) - charged."""
        return _slack_of(counters_load(&self._word))

    @property
    def version(self):
        """The weight version that the budget stands at."""
        return self._version

    @property
    def max_concurrent(self):
        """As given."""
        return self._limits.max_concurrent

    @property
    def batch(self):
        """As given."""
        return self._limits.batch

    @property
    def max_staleness(self):
        """As given."""
        return self._limits.max_staleness

    @property
    def accepted(self):
        """Rollouts accepted."""
        return self._accepted

    @property
    def enqueued(self):
        """Rollouts enqueued and not submitted yet."""
        return self._enqueued

    @property
    def rejected(self):
        """Rollouts rejected; they gave their budget back."""
        return self._rejected

    @property
    def running(self):
        """Rollouts submitted and not settled yet."""
        return self._running

    @property
    def charged(self):
        """Budget taken by `charge`."""
        return self._charged

    @property
    def granted(self):
        """Permits granted: the next number that `grant` gives."""
        return self._granted

    def stats(self):
        """Return (accepted, enqueued, rejected, running) of one moment."""
        return self._accepted, self._enqueued, self._rejected, self._running

    # ---- counting

    def try_submit(self, int64_t n=1):
        """Start n rollouts if there is room for all of them; say whether.

        Raises:
            ValueError: If n is negative.
        """
        _require_count(n)
        return self._try_submit(n)

    def grant(self, int64_t version):
        """Bring the budget to `version`, start one rollout there, and number it: one step.

        Returns:
            0, 1, 2, … in the order granted, or -1 if there is no room.

        Raises:
            OverflowError: If the budget at that version is beyond the word.
        """
        if version != self._version:
            self._move_to(version)
        if not self._try_submit(1):
            return -1
        self._granted += 1
        return self._granted - 1

    def submit(self, int64_t n=1):
        """Start n rollouts, room or not (AReaL's on_rollout_submitted)."""
        _require_count(n)
        self._add(-n, -n)
        self._enqueued -= n
        self._running += n

    def accept(self, int64_t n=1):
        """End n rollouts well: they leave the running and keep their budget."""
        _require_count(n)
        self._add(n, 0)
        self._running -= n
        self._accepted += n

    def reject(self, int64_t n=1):
        """End n rollouts badly: they leave the running and give their budget back."""
        _require_count(n)
        self._add(n, n)
        self._running -= n
        self._rejected += n

    def enqueue(self, int64_t n=1):
        """Count n rollouts as waiting; `try_submit` and `submit` take them off again."""
        _require_count(n)
        self._enqueued += n

    def charge(self, int64_t n):
        """Take n from the budget for good, for places of a batch that left unfilled.

        Otherwise a batch released short would leave its version's unused places to later rollouts,
        which could then wait longer than max_staleness for their turn.
        """
        _require_count(n)
        self._add(0, -n)
        self._charged += n

    def discard(self, int64_t n=1):
        """Take n accepted rollouts back before they were consumed: they give their budget back."""
        _require_count(n)
        self._add(0, n)
        self._accepted -= n
        self._rejected += n

    # ---- setting

    def set_version(self, int64_t version):
        """Move the budget to that version, forward or back."""
        if version != self._version:
            self._move_to(version)

    def set_limits(self, int64_t max_concurrent, int64_t batch, int64_t max_staleness):
        """Change the three limits; what is counted stays."""
        self._rebuild(Limits(max_concurrent, batch, max_staleness), self._version, self._accepted, self._charged)

    def recover(self, int64_t version, int64_t unconsumed=0):
        """Count as accepted what a run resumed at that version has consumed: version·batch.

        The budget stays at the version it stands at: `set_version` moves it. Nothing is charged any
        more, because the formula for the consumed counts every earlier batch as whole.

        Args:
            version: The recovered weight version (AReaL's on_version_recovered).
            unconsumed: Further accepted rollouts that were restored and wait for their batch.
        """
        _require_count(unconsumed)
        _require_span(version)
        cdef int64_t consumed = _product(version, max(self._limits.batch, 1))
        self._rebuild(self._limits, self._version, consumed + unconsumed, 0)

    def __repr__(self):
        return (f"<StalenessCounters [Capacity: {self.capacity} | Version: {self._version} | "
                f"{self._accepted} accepted, {self._enqueued} enqueued, {self._rejected} rejected, "
                f"{self._running} running, {self._charged} charged]>")

    # ---- the word

    cdef inline bint _try_submit(self, int64_t n) noexcept:
        cdef uint64_t word = counters_load(&self._word)
        cdef int64_t free, slack
        while True:
            free = _free_of(word) - n
            slack = _slack_of(word) - n
            if free < 0 or slack < 0:  # what is not below zero is within the word's range
                return False
            if counters_swap(&self._word, &word, _pack(free, slack)):
                break
        self._enqueued -= n
        self._running += n
        return True

    cdef inline int _add(self, int64_t free_more, int64_t slack_more) except -1:
        cdef uint64_t word = counters_load(&self._word)
        cdef int64_t free, slack
        while True:
            free = _free_of(word) + free_more
            slack = _slack_of(word) + slack_more
            if not _fits(free, slack):
                _raise_out_of_range(free, slack)
            if counters_swap(&self._word, &word, _pack(free, slack)):
                return 0

    cdef int _move_to(self, int64_t version) except -1:
        _require_span(version)
        self._add(0, _product(version - self._version, max(self._limits.batch, 1)))
        self._version = version
        return 0

    cdef int _rebuild(self, Limits limits, int64_t version, int64_t accepted, int64_t charged) except -1:
        """Set the word from what is counted, or raise and change nothing."""
        cdef int64_t free = max(limits.max_concurrent, 1)
        cdef int64_t slack
        for span in (limits.max_concurrent, limits.batch, limits.max_staleness, version, accepted):
            _require_span(span)
        slack = _product(limits.max_staleness + version + 1, max(limits.batch, 1))
        free -= self._running
        slack -= accepted + self._running + charged
        if not _fits(free, slack):
            _raise_out_of_range(free, slack)
        self._limits = limits
        self._version, self._accepted, self._charged = version, accepted, charged
        counters_store(&self._word, _pack(free, slack))
        return 0

    def _check(self):
        """Assert that the word and the statistics say the same; for tests."""
        cdef int64_t batch = max(self._limits.batch, 1)
        cdef int64_t budget = (self._limits.max_staleness + self._version + 1) * batch
        assert self.free == max(self._limits.max_concurrent, 1) - self._running
        assert self.slack == budget - (self._accepted + self._running) - self._charged
        assert self.capacity == min(self.free, self.slack)
        assert self._rejected >= 0 <= self._granted


cdef inline int _require_count(int64_t n) except -1:
    if n < 0 or n > SLACK_BIAS:
        _raise_bad_count(n)
    return 0

cdef int _raise_bad_count(int64_t n) except -1:
    if n < 0:
        raise ValueError(f"a count of rollouts must not be negative, and {n} is")
    raise OverflowError(f"a count of {n} rollouts is beyond 2**39, the range of the counters")

cdef inline int _require_span(int64_t value) except -1:
    """Keep sums of a few values within 64 bits; the word's own range is narrower still."""
    if value < -SLACK_BIAS or value > SLACK_BIAS:
        raise OverflowError(f"{value} is beyond ±2**39, the range of the staleness counters; "
                            "choose a smaller limit or version")
    return 0

cdef int64_t _product(int64_t a, int64_t b) except? -1:
    """a·b, or OverflowError where it passes the range by so much that sums could wrap."""
    product = <object> a * b
    if not -4 * SLACK_BIAS <= product <= 4 * SLACK_BIAS:
        raise OverflowError(f"a staleness budget of {product} is beyond ±2**39, the range of the "
                            "counters; choose a smaller max_staleness, batch or version")
    return product

cdef int _raise_out_of_range(int64_t free, int64_t slack) except -1:
    raise OverflowError(f"free places {free} or staleness budget {slack} would leave the range of the "
                        "counters, ±2**23 and ±2**39; nothing was changed")
