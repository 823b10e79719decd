"""A demo that is ended at some moment, goes on, and has trained every prompt once."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from arealtrio.demo.fleet import server_processes
from arealtrio.demo.options import DemoOptions
from arealtrio.demo.run import run_demo
from arealtrio.demo.task import base_model
from arealtrio.embedded.model import TinyModel
from arealtrio.errors import ConfigError, NoServerAvailable

from .processes import closed_pipe

STEPS, BATCH = 9, 16


def live(
    state: Path, last_step: int | None = None, number: signal.Signals = signal.SIGKILL
) -> tuple[int, str, list[psutil.Process]]:
    """One life of the command, ended by a signal when it has told so many steps.

    Returns:
        Its status, all that it said, and the servers that it had when it was ended.
    """
    words = ["--state", str(state), "--steps", str(STEPS), "--servers", "1", "--group-size", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "arealtrio", "demo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        said = ""
        servers: list[psutil.Process] = []
        for line in demo.stdout:
            said += line
            if line.startswith("step") and said.count("\nstep") == last_step:
                servers = psutil.Process(demo.pid).children()
                demo.send_signal(number)
    assert len(servers) == (last_step is not None)
    return demo.returncode, said, servers


def resumed_after(words: str) -> int:
    found = re.search(rf"^going on after step (\d+) of {STEPS}: ", words, re.MULTILINE)
    assert found is not None
    return int(found[1])


def versions(state: Path) -> list[str]:
    return sorted(path.name for path in (state / "weights").iterdir())


def test_the_same_command_goes_on_after_a_kill_and_a_ctrl_c(tmp_path: Path) -> None:
    status, first, servers = live(tmp_path, 3)
    assert status == -signal.SIGKILL
    assert "going on" not in first
    assert len(versions(tmp_path)) <= 2
    status, second, left = live(tmp_path, 2, signal.SIGINT)
    assert status == 130
    assert not any(server.is_running() for server in left)
    assert second.endswith(
        "interrupted; every server has ended; the same command goes on from there\n"
    )
    status, third, _ = live(tmp_path)
    assert status == 0
    assert 2 <= resumed_after(second) < resumed_after(third) < STEPS
    assert third.count("\nstep") == STEPS - resumed_after(third)
    assert f"prompts     {STEPS * BATCH} trained on, 0 of them twice" in third
    assert max(map(len, third.splitlines())) <= 80
    saved = json.loads((tmp_path / "checkpoint.json").read_text())
    assert Counter(saved["tally"]["prompts"]) == Counter(str(n) for n in range(STEPS * BATCH))
    assert versions(tmp_path) == [f"v{STEPS}"]
    assert psutil.wait_procs(servers, timeout=20)[1] == []  # which nobody could tell to end


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that runs already, and outlives every demo."""
    at = tmp_path_factory.mktemp("server")
    base_model().save(at / "v0")
    with server_processes(1, at / "v0", at, ["--max-num-seqs", "16"]) as (process,):
        yield process.url


@pytest.fixture
def options(url: str, tmp_path: Path) -> DemoOptions:
    state = tmp_path / "run"
    return DemoOptions(steps=4, batch_size=8, group_size=2, server_urls=(url,), state=state)


def test_a_run_that_has_finished_says_so_and_starts_nothing(options: DemoOptions) -> None:
    report = run_demo(options, io.StringIO())
    out = io.StringIO()
    assert run_demo(replace(options, server_urls=("http://127.0.0.1:1",)), out) == report
    assert out.getvalue().startswith("this run has finished; ")
    assert "prompts     32 trained on, 0 of them twice" in out.getvalue()
    unread = io.TextIOWrapper(closed_pipe())
    with pytest.raises(BrokenPipeError):
        run_demo(options, unread)  # now, and not when the interpreter ends
    with suppress(BrokenPipeError):
        unread.close()


def test_one_that_was_cut_off_before_its_report_trains_no_further(options: DemoOptions) -> None:
    report = run_demo(options, io.StringIO())
    assert options.state is not None
    file = options.state / "checkpoint.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "report": None}))
    out = io.StringIO()
    again = run_demo(options, out)
    assert "going on after step 4 of 4: 0 finished groups taken over, 0" in out.getvalue()
    assert "\nstep" not in out.getvalue()
    assert (again.steps, again.prompts, again.tokens) == (4, 32, report.tokens)
    assert again.steps_before == 4


def test_servers_that_run_already_take_up_each_run_s_weights_and_stay(
    options: DemoOptions, tmp_path: Path
) -> None:
    """They go back to version 0, and what they were asked for before is not counted again."""
    for seed in (0, 1):
        kept = tmp_path / f"kept-{seed}"
        report = run_demo(replace(options, state=None, seed=seed, keep_weights=kept), io.StringIO())
        (counts,) = report.servers.values()
        assert counts["requests"] == counts["requests_reported"] >= 32 * 2
        assert report.staleness_histogram[0] >= 16  # the first batch is of version 0
        first = TinyModel.load(kept / "v0").weights
        assert (first.output == base_model(seed).weights.output).all()
        assert sorted(path.name for path in kept.iterdir()) == [f"v{n}" for n in range(5)]


def test_a_checkpoint_without_sense_is_refused(options: DemoOptions) -> None:
    run_demo(options, io.StringIO())
    assert options.state is not None
    file = options.state / "checkpoint.json"
    saved = json.loads(file.read_text())
    for name, value in (("trainer", {}), ("tally", {"rewards": [1]}), ("trainer", [])):
        file.write_text(json.dumps({**saved, "report": None, name: value}))
        with pytest.raises(ConfigError, match="holds no trainer"):
            run_demo(options, io.StringIO())
    nonsense: list[Any] = [{}, [], {"staleness_histogram": {}}]
    for report in nonsense:
        file.write_text(json.dumps({**saved, "report": report}))
        with pytest.raises(ConfigError, match="holds no report"):
            run_demo(options, io.StringIO())


def test_a_server_that_does_not_answer_is_named(options: DemoOptions) -> None:
    with pytest.raises(NoServerAvailable, match=r"server http://127.0.0.1:1 does not answer"):
        run_demo(replace(options, server_urls=("http://127.0.0.1:1",)), io.StringIO())


def test_a_server_with_another_model_is_to_be_started_with_the_demo_s(
    options: DemoOptions, tmp_path: Path
) -> None:
    TinyModel.random(vocab_size=64).save(tmp_path / "other")
    assert options.state is not None
    with server_processes(1, tmp_path / "other", tmp_path) as (process,):
        for state, where in ((options.state, options.state / "weights" / "v0"), (None, "DIR/v0")):
            asked = replace(options, server_urls=(process.url,), state=state)
            with pytest.raises(NoServerAvailable, match=rf"arealtrio serve --weights {where}"):
                run_demo(asked, io.StringIO())
    assert TinyModel.load(options.state / "weights" / "v0").vocab_size == base_model().vocab_size
