"""Laws of the cap under pressure, for any series of reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arealtrio.pressure import DECREASE, INCREASE, KV_CACHE_FULL, CapController
from arealtrio.wire.dialect import ServerLoad

reports = st.lists(
    st.tuples(
        st.integers(0, 300),  # running
        st.integers(0, 50),  # waiting
        st.integers(0, 3),  # preempted since the last report
        st.integers(0, 2),  # preempted and out now
        st.sampled_from([0.0, 0.5, 0.94, KV_CACHE_FULL, 1.0]),
    ),
    max_size=60,
)


def load_of(running: int, waiting: int, total: int, out: int, usage: float) -> ServerLoad:
    return ServerLoad(running, waiting, 0, preemptions=total, preempted=out, kv_cache_usage=usage)


@given(reports=reports, full=st.integers(1, 256))
def test_a_cap_is_between_one_and_full_and_moves_with_the_pressure(
    reports: list[tuple[int, int, int, int, float]], full: int
) -> None:
    controller, total, first = CapController(), 0, True
    for running, waiting, preempted, out, usage in reports:
        total += preempted
        before = full if controller.cap is None else controller.cap
        cap = controller.observe(load_of(running, waiting, total, out, usage), full, 0)
        assert cap == controller.cap
        after = full if cap is None else cap
        assert 1 <= after <= full
        pressed = out > 0 or usage >= KV_CACHE_FULL or (preempted > 0 and not first)
        if pressed:
            assert after <= before
            if running + waiting > before < full:
                assert after == before  # what is in flight has not left yet
        else:
            assert after >= before
            assert after > before or before == full
        first = False


@given(full=st.integers(1, 256), start=st.integers(1, 256))
def test_without_pressure_a_cap_returns_to_full_in_a_bounded_time(full: int, start: int) -> None:
    controller = CapController()
    controller.cap = min(start, full)
    for _ in range(int(2 / INCREASE)):
        controller.observe(load_of(0, 0, 0, 0, 0.0), full, 0)
    assert controller.cap is None


@given(full=st.integers(2, 256), knee=st.integers(1, 256))
def test_a_cap_finds_a_server_that_holds_so_many_and_no_more(full: int, knee: int) -> None:
    """A server that always has as many as it may, and is full beyond ``knee``."""
    controller, caps = CapController(), []
    for _ in range(300):
        in_flight = full if controller.cap is None else controller.cap
        usage = 1.0 if in_flight > knee else 0.5
        controller.observe(load_of(in_flight, 0, 0, 0, usage), full, 0)
        caps.append(full if controller.cap is None else controller.cap)
    step = max(1, int(INCREASE * full))
    settled = caps[-50:]
    assert max(settled) <= min(full, knee + step)
    assert min(settled) >= min(full, int(DECREASE * knee) - step)


def test_a_weight_update_that_puts_all_requests_back_is_no_pressure() -> None:
    controller = CapController()
    assert controller.observe(load_of(8, 0, 0, 0, 0.5), 16, version=0) is None
    assert controller.observe(load_of(8, 0, 8, 0, 0.5), 16, version=1) is None
    assert controller.observe(load_of(8, 0, 9, 0, 0.5), 16, version=1) == 7


def test_a_restart_whose_count_begins_anew_is_no_pressure() -> None:
    controller = CapController()
    controller.observe(load_of(8, 0, 90, 0, 0.5), 16, version=0)
    assert controller.observe(load_of(8, 0, 3, 0, 0.5), 16, version=0) is None
