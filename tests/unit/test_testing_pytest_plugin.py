"""The fixtures for pytest, as a project sees them that switches them on."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "arealtrio.testing.pytest_plugin", "-p", "no:cacheprovider")
TESTS = """
    import pytest, trio
    from arealtrio import GenerationHyperparameters, SingleTurnWorkflow

    WORKFLOW = SingleTurnWorkflow(lambda *_, **__: 1.0, GenerationHyperparameters())
    PROMPTS = [{"input_ids": [1]}] * 4

    def test_plain(virtually, simulated_rollout):
        async def main():
            async with simulated_rollout(servers=2, consumer_batch_size=4) as (rollout, fleet):
                assert len(fleet.servers) == 2
                return len(await rollout.prepare_batch(PROMPTS, WORKFLOW))
        assert virtually(main) == 4

    @pytest.mark.seeds(3)
    def test_lengths_follow_from_the_seed(virtually, simulated_rollout, simulation_seed):
        async def main():
            async with simulated_rollout(consumer_batch_size=4) as (rollout, _):
                batch = await rollout.prepare_batch(PROMPTS, WORKFLOW)
                return [len(row) for row in batch.rows]
        assert virtually(main) == virtually(main)

    @pytest.mark.trio
    async def test_under_pytest_trio(simulated_fleet, autojump_clock):
        async with simulated_fleet(3) as fleet:
            fleet.servers[0].die()
            await trio.sleep(1000)

    @pytest.mark.seeds(10)
    def test_that_fails(simulation_seed):
        assert simulation_seed != 4

    def test_that_is_not_simulated():
        assert True
"""


def test_each_test_runs_with_its_seeds_and_a_failure_names_its_own(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(passed=1 + 3 + 1 + 9 + 1, failed=1)
    name = "*::test_that_fails[[]seed4]"
    repeat = f"seed 4; repeat with: pytest '{name}' --simulation-seed 4 --simulation-seeds 1"
    result.stdout.fnmatch_lines([repeat])


def test_the_line_repeats_the_failure_alone(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile(TESTS)
    chosen = ("--simulation-seed", "4", "--simulation-seeds", "1")
    again = pytester.runpytest_subprocess(*PLUGIN, f"{path}::test_that_fails[seed4]", *chosen)
    again.assert_outcomes(failed=1)
    more = pytester.runpytest_subprocess(*PLUGIN, "--simulation-seeds", "2", "-k", "plain")
    more.assert_outcomes(passed=2, deselected=7)


def test_the_kit_works_where_there_is_no_pytest() -> None:
    code = """
import sys
sys.modules["pytest"] = sys.modules["_pytest"] = None
import arealtrio.testing, trio
assert arealtrio.testing.run_virtually(trio.sleep, 1000) is None
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
