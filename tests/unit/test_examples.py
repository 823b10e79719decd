"""Every example runs as a newcomer would run it, and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

LAST_WORDS = {
    "filter_and_evaluate": "evaluation: ",
    "inside_trio": "left on the server: 0 requests",
    "multi_turn": "loss_mask [0, 0, 1",
    "trainer_loop": "step 8: reward ",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LAST_WORDS.keys()


@pytest.mark.parametrize("name", sorted(LAST_WORDS))
def test_it_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr  # a busy machine may be told of slow steps there
    assert ended.stdout.splitlines()[-1].startswith(LAST_WORDS[name])
    assert list(tmp_path.iterdir()) == []
