"""Outcomes as lines for a terminal, at most 80 columns wide, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .bars import bar, binned, columns
from .outcome import Outcome
from .plan import Plan

WIDTH = 80
_BINS = 12
_BAR = 4  # columns that a bar has at least, or there is none
_NAME = 16  # columns of the names down the left side


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One plan of those that were asked for, and what came of it.

    Args:
        plan: With its values of the swept fields.
        values: Those values as written, by field; empty where nothing is swept.
        outcome: None if it was not finished, nor far enough to say anything.
    """

    plan: Plan
    values: Mapping[str, str]
    outcome: Outcome | None


def as_json(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return everything as plain values."""
    return {"settings": [_as_dict(setting) for setting in settings]}


def _as_dict(setting: Setting) -> dict[str, Any]:
    outcome = setting.outcome
    return {
        "values": dict(setting.values),
        "plan": _plan_as_dict(setting.plan),
        "outcome": None if outcome is None else outcome.as_dict(),
    }


def _plan_as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as it would be written on the command line, with what it chose by itself."""
    values: dict[str, Any] = {
        name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "answers"
    }
    return {
        **values,
        "servers": ",".join(map(str, plan.servers)),
        "lengths": str(plan.answers),
        "max_staleness": "inf" if plan.max_staleness is None else plan.max_staleness,
        "max_concurrent_rollouts": plan.max_concurrent_rollouts or plan.slots,
        "warm_up": plan.steps_not_counted,
        "prompts": plan.prompts_of_an_epoch,
        "grain": plan.tokens_simulated_as_one,
    }


def lines(settings: Sequence[Setting], *, plain: bool = False) -> Iterator[str]:
    """Return the report of one setting, or the comparison of several.

    Args:
        settings: At least one, with an outcome or without.
        plain: Use ASCII alone.
    """
    done = [(s, s.outcome) for s in settings if s.outcome is not None]
    if len(settings) == 1:
        for setting, outcome in done:
            yield from _one(setting.plan, outcome, plain=plain)
    elif done:
        yield from _several([s for s, _ in done], [o for _, o in done], plain=plain)


# --- one setting ---------------------------------------------------------------------------------


def _one(plan: Plan, outcome: Outcome, *, plain: bool) -> Iterator[str]:
    for name, text in _summary(plan, outcome):
        yield from textwrap.wrap(
            f"{name:<{_NAME}}{text}", WIDTH, subsequent_indent=_NAME * " ", break_on_hyphens=False
        )
    yield ""
    yield from _histograms(outcome, plain=plain)


def _summary(plan: Plan, outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield (
        "throughput",
        (
            f"{outcome.tokens_per_s:,.0f} tokens/s, {outcome.rollouts_per_s:,.2f} rollouts/s, "
            "trained on"
        ),
    )
    yield (
        "a step",
        (
            f"{outcome.step_s:,.1f} s: {outcome.trainer_wait_s:,.1f} waiting "
            f"({outcome.trainer_wait:.0%}), {plan.training_s:,.1f} training, "
            f"{outcome.update_s:,.1f} for new weights"
        ),
    )
    kinds = ", ".join(f"{kind} {used:.0%}" for kind, used in outcome.utilisation_by_kind.items())
    yield "servers busy", f"{outcome.utilisation:.0%} of all slots ({kinds})"
    yield (
        "answers",
        (
            f"{outcome.answer_tokens:,.0f} tokens on average where trained on, "
            f"{plan.answers.mean:,.0f} as given"
        ),
    )
    yield (
        "too old",
        (f"{outcome.violations:,} groups trained on all the same, {outcome.given_up:,} given up"),
    )
    yield "counted", f"{outcome.steps} steps, {outcome.seconds:,.0f} s of simulated time"


def _histograms(outcome: Outcome, *, plain: bool) -> Iterator[str]:
    """Two histograms side by side."""
    width = (WIDTH - _NAME) // 2
    yield f"{'staleness':<{_NAME}}{'tokens':<{width}}{'rollouts, by their oldest token'}"
    last = outcome.oldest
    tokens = binned({last: 0, **outcome.token_staleness}, _BINS)
    heads = binned({last: 0, **outcome.head_staleness}, _BINS)
    for name in tokens:
        pair = (tokens[name], heads[name])
        cells = (f"{bar(s, width - 8, plain=plain)} {s:>6.1%} " for s in pair)
        yield f"{name:>{_NAME - 7}}{'':7}{''.join(cells)}".rstrip()


# --- several -------------------------------------------------------------------------------------


def _several(
    settings: Sequence[Setting], outcomes: Sequence[Outcome], *, plain: bool
) -> Iterator[str]:
    table = _table(outcomes)
    room = WIDTH - sum(column.width + 1 for column in table)
    names = _Names(settings, room)
    left = room - names.width - 2
    width = left if left >= _BAR else 0
    for title, line in zip(names.titles, (0, 1), strict=True):
        yield _row(title, [column.title[line] for column in table], table, width * " ")
    most = max(o.tokens_per_s for o in outcomes)
    for setting, o in zip(settings, outcomes, strict=True):
        share = bar(o.tokens_per_s / most, width, plain=plain)
        yield _row(names.of(setting), [column.text(o) for column in table], table, share)
    yield ""
    yield from _compared_histograms(settings, outcomes, names, plain=plain)


class _Column(NamedTuple):
    title: tuple[str, str]
    width: int
    text: Callable[[Outcome], str]


def _table(outcomes: Sequence[Outcome]) -> list[_Column]:
    """The numbers of a line; the bar goes behind the second."""
    first = outcomes[0].tokens_per_s
    table = [
        _Column(("", "tokens/s"), 10, lambda o: f"{o.tokens_per_s:,.0f}"),
        _Column(("", "/ first"), 7, lambda o: f"{o.tokens_per_s / first:.2f}"),
        _Column(("slots", "busy"), 5, lambda o: f"{o.utilisation:.0%}"),
        _Column(("trainer", "waits"), 7, lambda o: f"{o.trainer_wait:.0%}"),
        _Column(("staleness", "mean"), 9, lambda o: _short(o.mean_staleness)),
        _Column(("", "max"), 4, lambda o: f"{o.oldest}"),
        _Column(("groups", "lost"), 6, lambda o: f"{o.given_up:,}"),
    ]
    return table if any(o.given_up for o in outcomes) else table[:-1]


def _row(name: str, cells: Sequence[str], table: Sequence[_Column], share: str) -> str:
    padded = [cell.rjust(column.width) for cell, column in zip(cells, table, strict=True)]
    return " ".join([name, *padded[:2], *([f" {share}"] if share else []), *padded[2:]]).rstrip()


class _Names:
    """The left column: one swept field above the other, and a value of each below.

    Args:
        settings: What is to be named.
        room: Columns there are; values that do not fit are cut.
    """

    def __init__(self, settings: Sequence[Setting], room: int) -> None:
        fields = list(settings[0].values)
        gaps = len(fields) - 1
        self._widths = [max(len(setting.values[name]) for setting in settings) for name in fields]
        if sum(self._widths) + gaps > room:
            self._widths = [min(width, (room - gaps) // len(fields)) for width in self._widths]
        self.width = max(sum(self._widths) + gaps, *map(len, fields), 8)
        self.titles = [title.ljust(self.width) for title in ["", *fields][-2:]]

    def of(self, setting: Setting) -> str:
        """A setting's line begins with this."""
        values = zip(setting.values.values(), self._widths, strict=True)
        return " ".join(text[:width].ljust(width) for text, width in values).ljust(self.width)


def _compared_histograms(
    settings: Sequence[Setting], outcomes: Sequence[Outcome], names: _Names, *, plain: bool
) -> Iterator[str]:
    """One line for each setting, all on one scale from staleness 0."""
    last, most = max(o.oldest for o in outcomes), WIDTH - names.width - 1
    yield f"{'':{names.width}} tokens by staleness, from 0 at the left to {last}"
    for setting, o in zip(settings, outcomes, strict=True):
        shares = binned({last: 0, **o.token_staleness}, most)
        yield f"{names.of(setting)} {columns(list(shares.values()), plain=plain)}"


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"
