"""What a simulated run is given: fleets, and the checks of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from arealtrio.config import RolloutConfig
from arealtrio.errors import ConfigError
from arealtrio.simulate.answers import FixedAnswers
from arealtrio.simulate.plan import COUNT_MAX, SIMULATED_MAX, Plan
from arealtrio.simulate.servers import ServerKind, fleet


def plan(**changes: Any) -> Plan:
    return Plan(**{"servers": fleet("2x8@50"), "answers": FixedAnswers(1000), **changes})


def test_a_fleet_is_read_as_it_is_written() -> None:
    kinds = fleet("4x8@50, 2x24@80.5")
    assert kinds == (ServerKind(4, 8, 50), ServerKind(2, 24, 80.5))
    assert ",".join(map(str, kinds)) == "4x8@50,2x24@80.5"


@pytest.mark.parametrize(
    "text",
    ["", "4", "4x8", "4x8@", "4x8@-1", "4x8@0", "0x8@50", "4x0@50", "4x8@1e400", "4x8@nan",
     "-4x8@50", "4x8@50,", "4 x 8 @ 50 tokens", "999999999x8@50", "1x99999999@50", "٤x8@50x"],
)  # fmt: skip
def test_what_is_no_fleet_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        fleet(text)


def test_a_plan_is_a_config_and_server_settings() -> None:
    mixed = plan(servers=fleet("2x8@50,1x24@100"), update_s=3, slow_down=0.1, grain=10)
    settings = mixed.server_settings()
    assert [(s.max_num_seqs, s.token_time_s) for s in settings] == [(8, 0.2), (8, 0.2), (24, 0.1)]
    assert {(s.load_time_s, s.batch_growth) for s in settings} == {(3, 0.1)}
    config = RolloutConfig(**mixed.config())
    assert (config.max_concurrent_rollouts, config.consumer_batch_size) == (40, 64)
    assert mixed.kinds() == [0, 0, 1]


def test_no_bound_is_one_that_no_run_reaches() -> None:
    unbounded = RolloutConfig(**plan(max_staleness=None, batch_size=1000).config())
    assert unbounded.max_staleness > COUNT_MAX


def test_the_grain_follows_the_answers() -> None:
    assert plan().tokens_simulated_as_one == 10
    assert plan(answers=FixedAnswers(20)).tokens_simulated_as_one == 1
    assert plan(grain=3).tokens_simulated_as_one == 3
    assert plan(answers=FixedAnswers(100), grain=100).tokens_simulated_as_one == 100


@pytest.mark.parametrize(
    "changes",
    [
        {"servers": ()},
        {"servers": fleet("100000x1000@50")},
        *({name: 0} for name in ("batch_size", "group_size", "prompts", "grain", "training_s")),
        {"steps": 1},
        {"batch_size": COUNT_MAX + 1},
        {"warm_up": 40},
        {"warm_up": -1},
        *({name: bad} for name in ("training_s", "update_s", "latency_s", "slow_down")
          for bad in (-1.0, float("nan"), float("inf"))),
        {"max_staleness": -1},
        {"max_staleness": 2**40},
        {"straggler_policy": "hope"},
        {"schedule_policy": "random"},
        {"queue_order": "lifo"},
        {"max_concurrent_rollouts": -1},
        {"seed": -1},
        {"answers": FixedAnswers(SIMULATED_MAX + 1), "grain": 1},
        {"answers": FixedAnswers(100), "grain": 101},
        *({name: 1e12} for name in ("training_s", "update_s", "latency_s", "slow_down")),
        {"slow_down": 1e308},
        {"training_s": 1e308, "update_s": 1e308},
        {"servers": fleet("1x1@0.0000000001")},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_their_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan(**changes)
