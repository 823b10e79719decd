"""Outcomes as a picture. The one module that imports matplotlib, which is an extra."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .bars import binned
from .outcome import Outcome
from .report import Setting

# Okabe and Ito's colours, which stay apart for colour-blind eyes, less the yellow that is faint on
# white; and marks and strokes that stay apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
STROKES = ("-", "--", "-.", ":")
_BINS = 16
_TITLE = 84  # characters of a line
_KINDS = 14  # of servers, with a bar each

Done: TypeAlias = tuple[Setting, Outcome]


def draw(settings: Sequence[Setting], path: Path) -> None:
    """Write a picture; the format is the suffix's.

    Args:
        settings: Those without an outcome are left out; nothing is written if none has one.
        path: A ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        OSError: If it can not be written.
    """
    done = [(s, s.outcome) for s in settings if s.outcome is not None]
    if not done:
        return
    figure = Figure(figsize=(10, 7), layout="constrained")
    if len(settings) == 1:
        _one(figure, *done[0])
    else:
        _several(figure, done)
    figure.savefig(path, dpi=150)


# --- one setting ---------------------------------------------------------------------------------


def _one(figure: Figure, setting: Setting, outcome: Outcome) -> None:
    figure.suptitle(_title(setting, outcome))
    ((staleness, throughput), (step, busy)) = figure.subplots(2, 2)
    _draw_staleness(staleness, outcome)
    _draw_throughput(throughput, setting, outcome)
    _draw_step(step, setting, outcome)
    _draw_busy(busy, outcome)


def _title(setting: Setting, outcome: Outcome) -> str:
    """The fleet, as far as two lines hold it, and its speed; one line where both are short."""
    fleet = f"servers {', '.join(map(str, setting.plan.servers))}"
    speed = (
        f"{outcome.tokens_per_s:,.0f} tokens/s, {outcome.rollouts_per_s:,.2f} rollouts/s trained on"
    )
    if len(fleet) + len(speed) < _TITLE:
        return f"{fleet}: {speed}"
    return f"{textwrap.fill(fleet, _TITLE, max_lines=2, placeholder=' …')}\n{speed}"


def _draw_staleness(axes: Axes, outcome: Outcome) -> None:
    last = outcome.oldest
    histograms = (
        ("tokens", outcome.token_staleness),
        ("rollouts, by their oldest token", outcome.head_staleness),
    )
    for index, (name, histogram) in enumerate(histograms):
        bins = binned({last: 0, **histogram}, _BINS)
        places = [place + 0.4 * (index - 0.5) for place in range(len(bins))]
        axes.bar(places, list(bins.values()), 0.4, label=name, color=COLOURS[index],
                 hatch=("", "//")[index], edgecolor="white")  # fmt: skip
        _name_places(axes, list(bins))
    axes.set(xlabel="staleness (weight versions)", ylabel="share", title="Staleness")
    axes.margins(y=0.4)  # above the bars is the legend's
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper right")


def _draw_throughput(axes: Axes, setting: Setting, outcome: Outcome) -> None:
    first = setting.plan.steps_not_counted + 1
    numbers = range(first, first + outcome.steps)
    axes.plot(numbers, outcome.step_tokens_per_s, MARKS[0] + "-", color=COLOURS[0], markersize=4)
    axes.axhline(outcome.tokens_per_s, color=COLOURS[1], linestyle="--", label="mean")
    axes.set(xlabel="training step", ylabel="tokens/s trained on", title="Throughput of each step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")
    _from_zero(axes)


def _draw_step(axes: Axes, setting: Setting, outcome: Outcome) -> None:
    parts = {
        "waiting for rollouts": outcome.trainer_wait_s,
        "training": setting.plan.training_s,
        "new weights": outcome.update_s,
    }
    _draw_bars(axes, parts, "{:,.1f} s")
    axes.set(xlabel="seconds (mean)", title="What the trainer does in a step")


def _draw_busy(axes: Axes, outcome: Outcome) -> None:
    used = {"all servers": outcome.utilisation}
    if len(outcome.utilisation_by_kind) > 1:
        used |= _few(outcome.utilisation_by_kind)
    _draw_bars(axes, used, "{:.0%}")
    axes.set(xlabel="share of the slots that generate", title="Servers busy", xlim=(0, 1.18))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _few(used: Mapping[str, float]) -> Mapping[str, float]:
    """All kinds of servers; of more than there is room for, the busiest and the least busy."""
    if len(used) <= _KINDS:
        return used
    least, *_, busiest = sorted(used, key=used.__getitem__)
    return {f"busiest: {busiest}": used[busiest], f"least busy: {least}": used[least]}


def _draw_bars(axes: Axes, values: dict[str, float], form: str) -> None:
    """Level bars, from top to bottom, each with its value."""
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(values))]
    bars = axes.barh(list(values), list(values.values()), 0.6, color=colours)
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3)
    axes.margins(x=0.18)
    axes.invert_yaxis()


# --- several -------------------------------------------------------------------------------------


def _several(figure: Figure, done: Sequence[Done]) -> None:
    ((throughput, busy), (waits, staleness)) = figure.subplots(2, 2)
    _draw_lines(throughput, done, lambda o: o.tokens_per_s)
    throughput.set(ylabel="tokens/s trained on", title="Throughput")
    _draw_lines(busy, done, lambda o: o.utilisation)
    busy.set(ylabel="share of the slots that generate", title="Servers busy")
    _draw_lines(waits, done, lambda o: o.trainer_wait)
    waits.set(ylabel="share of its time", title="The trainer waits")
    _draw_lines(staleness, done, lambda o: o.mean_staleness)
    staleness.set(ylabel="versions (mean of all tokens)", title="Staleness")
    for axes in (throughput, busy, waits, staleness):
        axes.set_xlabel(next(iter(done[0][0].values)))
        _from_zero(axes)
    for axes in (busy, waits):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, 1.05)
    if len(done[0][0].values) > 1:
        _add_legend(figure, throughput, done)


def _add_legend(figure: Figure, axes: Axes, done: Sequence[Done]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=list(done[0][0].values)[1],
        loc="outside lower center",
        ncols=min(len(labels), 6),
    )


def _draw_lines(axes: Axes, done: Sequence[Done], value: Callable[[Outcome], float]) -> None:
    """The first swept field runs along x, the second makes the lines."""
    along = list(dict.fromkeys(_swept(setting, 0) for setting, _ in done))
    stroked = all(map(_is_number, along))  # between two policies there is nothing
    for index, line in enumerate(dict.fromkeys(_swept(setting, 1) for setting, _ in done)):
        points = [
            (along.index(_swept(setting, 0)), value(outcome))
            for setting, outcome in done
            if _swept(setting, 1) == line
        ]
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKS[index % len(MARKS)],
            markersize=6 + 3 * index,  # and hollow: lines that coincide show all the same
            markerfacecolor=None if index == 0 else "none",
            linestyle=STROKES[index % len(STROKES)] if stroked else "",
            label=line,
        )
    _name_places(axes, along)


def _swept(setting: Setting, axis: int) -> str:
    values = list(setting.values.values())
    return values[axis] if axis < len(values) else ""


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    """Names along x; slanted where they would run into each other."""
    crowded = sum(len(name) + 1 for name in names) > 45
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.set_xlim(-0.6, len(names) - 0.4)


def _from_zero(axes: Axes) -> None:
    axes.margins(y=0.12)
    axes.set_ylim(0, None if axes.dataLim.y1 > 0 else 1)
    if axes.get_ylim()[1] >= 1000:  # below 1 it would write 500m, which nobody says of tokens
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", alpha=0.3)
