"""LeastRequestHeap in long use: many servers, leases returned in any order, a scan's choices."""

import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from arealtrio._core.heap import LeastRequestHeap

from ..models.heap import ScanModel


@settings(max_examples=20)
@given(
    caps=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
)
@example(caps=[4] * 25, seed=0)
@example(caps=[2, 3, 4, 6] * 8, seed=1)
def test_takes_what_a_scan_takes(caps: list[int], seed: int) -> None:
    heap, model, choice = LeastRequestHeap(), ScanModel(), random.Random(seed)
    names = {heap.add(cap): f"server-{i}" for i, cap in enumerate(caps)}
    for name, cap in zip(names.values(), caps, strict=True):
        model.add(name, cap)
    held: list[int] = []
    for _ in range(250):
        if held and choice.random() < 0.45:
            lease = held.pop(choice.randrange(len(held)))
            heap.release(lease)
            model.release(lease)
        else:
            expected = model.choose()
            lease = heap.acquire()
            assert (lease == -1) == (expected is None)
            if expected is not None:
                assert names[heap.slot_of(lease)] == expected
                model.take(expected, lease)
                held.append(lease)
        heap._check()
