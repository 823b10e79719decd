"""The list of defects is whole, and says of each where its test is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NUMBERS = {
    "A": range(1, 12),
    "B": range(12, 22),
    "C": range(22, 27),
    "D": range(27, 31),
    "E": range(31, 36),
}
ROWS = dict(re.findall(r"^\| ([A-E]\d+) \|.*\| (.*) \|$", (HERE / "README.md").read_text(), re.M))


def test_every_number_is_there() -> None:
    assert list(ROWS) == [f"{group}{n}" for group, numbers in NUMBERS.items() for n in numbers]


@pytest.mark.parametrize("number", ROWS)
def test_it_has_a_test_of_its_number_or_a_reason_for_none(number: str) -> None:
    where = ROWS[number]
    files = re.findall(r"`([./\w]*test_\w+\.py)`", where)
    if not files:
        assert where.startswith(("Does not apply: ", "By design "))
        return
    (file,) = files
    text = (HERE / file).read_text()
    if "/" not in file:
        assert f"def test_{number[0].lower()}{int(number[1:]):02}_" in text
