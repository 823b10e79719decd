"""Lengths from a recorded trace."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from arealtrio import ConfigError
from arealtrio.testing import RecordedLengths


def drawn(lengths: RecordedLengths, count: int) -> list[int]:
    return [lengths.draw(random.Random(0)) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("3\n\n1\n", "anything"),
        ('{"usage": {"completion_tokens": 3}}\n{"usage": {"completion_tokens": 1}}', None),
        ('{"n": 3, "m": 9}\n{"n": 1}\n', "n"),
    ],
)
def test_lengths_are_read_from_lines(tmp_path: Path, text: str, field: str | None) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    options = {} if field is None else {"field": field}
    assert drawn(RecordedLengths.from_jsonl(path, **options), 3) == [3, 1, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "one or more"),
        ("1\nx\n", "line 2 of .* is not JSON"),
        ('{"tokens": 3}', "line 1 of .* has no usage.completion_tokens"),
        ('{"usage": 3}\n{"usage": {}}', "line 2"),
        ("0", "at least 1"),
        ('"3"', "line 1"),
        ("3\n[]", "line 2"),
        ("2.5", "line 1"),
    ],
)
def test_a_line_without_a_length_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        RecordedLengths.from_jsonl(path)


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'1\n{"tokens": 3, "text": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .* is not UTF-8"):
        RecordedLengths.from_jsonl(path, "tokens")


def test_a_trace_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RecordedLengths.from_jsonl(tmp_path / "nothing.jsonl")
