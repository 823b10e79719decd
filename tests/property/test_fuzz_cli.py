"""Every option of every command: nonsense is exit status 2 and one line that names the option.

The options are those that click knows of, so that a new command is tried with the rest.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arealtrio import cli
from arealtrio.embedded.__main__ import command as serve

from .fuzzing import SECRET

# Modules that are a command of their own beside ``arealtrio``, and its name in each.
ALONE = {"benchmarks.report": "main"}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its words, from the groups down."""
    yield "python -m arealtrio.embedded", serve
    for module, name in ALONE.items():
        yield f"python -m {module}", getattr(importlib.import_module(module), name)
    yield from below("arealtrio", cli.main)


def below(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from below(f"{words} {name}", inner)


COMMANDS = dict(commands())
OPTIONS = {
    f"{words} {option.opts[0]}": (words, option)
    for words, command in COMMANDS.items()
    for option in command.params
}
WITH_VALUE = {
    name: (words, option)
    for name, (words, option) in OPTIONS.items()
    if not getattr(option, "is_flag", False)
}
NONSENSE = [
    "", " ", "-", "--", "x", "-1", "0", "1.5", "1e9", "nan", "inf", "-inf", "NaN", "0x10", "١",
    "9" * 30, "1" * 5000, "\udcff", "a\nb", "é", "\u2028", "None", "[]", "=", SECRET, "x" * 5000,
    "1e400", "\ud800", "/no/such/place/file", "/dev/null/x", "y" * 300 + "/x", "least_request ",
]  # fmt: skip
nonsense = st.sampled_from(NONSENSE) | st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=()), max_size=6
)


def tried(monkeypatch: pytest.MonkeyPatch, words: str, *arguments: str) -> tuple[Result, list[Any]]:
    """Call a command whose body is not run; return what it was called with."""
    called: list[Any] = []
    command = COMMANDS[words]
    with monkeypatch.context() as patch:
        patch.setattr(command, "callback", lambda **values: called.append(values))
        result = CliRunner().invoke(command, list(arguments))
    return result, called


def broken(argument: str) -> bool:
    """Whether it has line breaks of its own, which click repeats."""
    return len(f"{argument}.".splitlines()) > 1


def check_refusal(result: Result, *arguments: str) -> None:
    """Perhaps how it is used, and one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.output.count("Error: ") == 1
    words = result.output.partition("Error: ")[2].removesuffix("\n")
    assert len(words.splitlines()) == 1 or any(broken(argument) for argument in arguments)


fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
                  max_examples=max(20, settings().max_examples // 3))  # fmt: skip


@pytest.mark.parametrize("name", WITH_VALUE)
def test_nonsense_for_an_option_is_its_type_or_exit_2(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for value in NONSENSE:
        check_value(monkeypatch, name, value)


@pytest.mark.parametrize("name", WITH_VALUE)
@fuzzed
@given(value=nonsense)
def test_any_value_of_an_option_is_its_type_or_exit_2(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    check_value(monkeypatch, name, value)


def check_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    words, option = WITH_VALUE[name]
    arguments = [value] if isinstance(option, click.Argument) else [f"{option.opts[0]}={value}"]
    result, called = tried(monkeypatch, words, *arguments, *required(words, option))
    if not called and isinstance(option, click.Option) and option.is_eager:
        return  # --version and --help do their work while they are parsed
    if not called:
        check_refusal(result, value)
        assert option.opts[0] in result.output
        return
    assert result.exit_code == 0
    taken = called[0][option.name]
    for one in taken if isinstance(taken, tuple) else (taken,):
        assert not isinstance(one, float) or math.isfinite(one)
        if isinstance(option.type, click.Choice):
            assert one in option.type.choices


def required(words: str, beside: click.Parameter) -> list[str]:
    """Something for what a command can not do without, beside one option."""
    found: list[str] = []
    for option in COMMANDS[words].params:
        if option.required and option is not beside:
            value = next(iter(getattr(option.type, "choices", ["1"])))
            found += [value] if isinstance(option, click.Argument) else [option.opts[0], value]
    return found


@pytest.mark.parametrize("words", COMMANDS)
@fuzzed
@given(arguments=st.lists(nonsense | st.sampled_from(["--bogus", "--seed", "-x", "demo"]),
                          min_size=1, max_size=4))  # fmt: skip
def test_any_arguments_are_taken_or_exit_2(
    monkeypatch: pytest.MonkeyPatch, words: str, arguments: list[str]
) -> None:
    if isinstance(COMMANDS[words], click.Group):
        arguments = ["--bogus", *arguments]
    result, called = tried(monkeypatch, words, *arguments)
    if not called and result.exit_code != 0:
        check_refusal(result, *arguments)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_and_every_option_says_what_it_is(words: str) -> None:
    assert COMMANDS[words].help
    result = CliRunner().invoke(COMMANDS[words], ["--help"])
    assert result.exit_code == 0
    assert all(option.opts[0] in result.output for option in COMMANDS[words].params
               if isinstance(option, click.Option))  # fmt: skip


def body_of(monkeypatch: pytest.MonkeyPatch, stop: Callable[..., Any]) -> None:
    """Let commands go as far as to begin, and no further."""
    monkeypatch.setattr("arealtrio.cli.run_demo", stop)
    monkeypatch.setattr("arealtrio.embedded.__main__.main", stop)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--json", "x" * 300 + "/a.json"],
        ["demo", "--json", "/dev/null/a.json"],
        ["demo", "--keep-weights", "x" * 300],
        ["demo", "--keep-weights", "/dev/null/a"],
        ["demo", "--state", "x" * 300],
        ["demo", "--state", "/dev/null/a"],
        ["demo", "--server", "http://a:1", "--servers", "2"],
        ["serve", "--token-time-s", "nan"],
        ["serve", "--health-time-s", "inf"],
        ["serve", "--health-time-s", "-1"],
        ["serve", "--max-num-seqs", "99999999999"],
        ["serve", "--served-model-name", "\udcff"],
        ["serve", "--dialect", "sglang", "--logprobs-mode", "processed_logprobs"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_what_can_not_be_begun_is_exit_2_and_begins_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, arguments: list[str]
) -> None:
    begun: list[Any] = []
    body_of(monkeypatch, lambda *_, **__: begun.append(1))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, arguments)
    check_refusal(result)
    assert not begun
