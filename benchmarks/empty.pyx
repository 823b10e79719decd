# cython: language_level=3, binding=True, embedsignature=True
"""What a call of a compiled method costs before it does anything."""


cdef class Empty:
    """Methods with the signatures of LeastRequestHeap and StalenessCounters, and no work in them."""

    def acquire(self):
        return 1

    def release(self, long long lease):
        return 1

    def try_submit(self, long long n=1):
        return True

    def accept(self, long long n=1):
        pass

    @property
    def capacity(self):
        return 1
