"""The fixtures for pytest, as a project sees them that switches them on."""

from __future__ import annotations

import shlex
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


def test_a_mark_may_name_its_count(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS.replace("seeds(10)", "seeds(count=10)"))
    result = pytester.runpytest_subprocess(*PLUGIN, "-k", "fails")
    result.assert_outcomes(passed=9, failed=1, deselected=6)


def test_a_mark_without_a_count_is_an_error_that_names_the_test(pytester: pytest.Pytester) -> None:
    wrong = ["", "0", "-1", "True", "'3'", "2, 3", "counts=3", "2, count=3"]
    for number, count in enumerate(wrong):
        text = TESTS.replace("seeds(10)", f"seeds({count})")
        pytester.makepyfile(**{f"test_wrong_{number}": text})
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(errors=len(wrong))
    for number in range(len(wrong)):
        line = f"test_wrong_{number}.py::test_that_fails: write @pytest.mark.seeds(N), *"
        result.stdout.fnmatch_lines([line])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


@pytest.mark.parametrize("count", ["0", "-3"])
def test_an_option_without_a_count_runs_nothing(pytester: pytest.Pytester, count: str) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess(*PLUGIN, f"--simulation-seeds={count}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*argument --simulation-seeds: *"])


def test_the_line_is_for_the_shell_it_is_printed_in(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]")
    path = pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("text", ["it's", "$(x y)::z]"])
        def test_that_fails(simulation_seed, text):
            assert not text
    """)
    monkeypatch.chdir(pytester.mkdir("elsewhere"))
    result = pytester.runpytest_subprocess(*PLUGIN, f"../{path.name}")
    result.assert_outcomes(failed=2)
    lines = [line.partition("repeat with: ")[2] for line in result.outlines if "repeat" in line]
    assert len(lines) == 2
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "pytest"
        pytester.runpytest_subprocess(*PLUGIN, *arguments).assert_outcomes(failed=1)


def test_the_kit_works_where_there_is_no_pytest() -> None:
    code = """
import sys
sys.modules["pytest"] = sys.modules["_pytest"] = None
import arealtrio.testing, trio
assert arealtrio.testing.run_virtually(trio.sleep, 1000) is None
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
