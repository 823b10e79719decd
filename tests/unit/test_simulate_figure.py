"""Pictures of outcomes: there, of the size asked for, and nothing in them over anything else."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from arealtrio.simulate import FixedAnswers, Outcome, Plan, fleet
from arealtrio.simulate import figure as module
from arealtrio.simulate.report import Setting

PLAN = Plan(servers=fleet("4x8@50,4x24@80"), answers=FixedAnswers(1000))


def outcome(
    tokens_per_s: float = 5000.0, oldest: int = 4, kinds: Sequence[str] = ("4x8@50", "4x24@80")
) -> Outcome:
    return Outcome(
        steps=30,
        seconds=1860.0,
        tokens_per_s=tokens_per_s,
        rollouts_per_s=4.4,
        answer_tokens=1200.0,
        step_s=62.0,
        trainer_wait_s=15.5,
        update_s=2.0,
        utilisation=0.93,
        utilisation_by_kind={kind: 0.9 + 0.005 * n for n, kind in enumerate(kinds)},
        token_staleness={age: 10 + age for age in range(oldest + 1)},
        head_staleness=dict.fromkeys(range(oldest + 1), 1),
        violations=0,
        given_up=0,
        step_tokens_per_s=tuple(tokens_per_s + 100 * (step % 3) for step in range(30)),
    )


def of_kinds(count: int) -> Setting:
    kinds = [f"{n}x16@50" for n in range(1, count + 1)]
    plan = replace(PLAN, servers=fleet(",".join(kinds)))
    return Setting(plan=plan, values={}, outcome=outcome(kinds=kinds))


def swept(**axes: list[str]) -> list[Setting]:
    names = list(axes)
    return [
        Setting(plan=PLAN, values=dict(zip(names, values, strict=True)), outcome=outcome(1000 * k))
        for k, values in enumerate(_product(*axes.values()), 1)
    ]


def _product(first: list[str], second: list[str] | None = None) -> Iterator[tuple[str, ...]]:
    for one in first:
        yield from [(one,)] if second is None else [(one, other) for other in second]


CASES = {
    "one": [Setting(plan=PLAN, values={}, outcome=outcome(1e7, 900))],
    "one of 12 kinds": [of_kinds(12)],
    "one of 14 kinds": [of_kinds(14)],
    "one of 100 kinds": [of_kinds(100)],
    "numbers": swept(max_staleness=["0", "1", "2", "4", "8", "16", "inf"]),
    "words": swept(queue_order=["fifo", "deadline", "longest_expected"]),
    "two axes": swept(
        max_staleness=["0", "4", "inf"], straggler_policy=["wait", "keep", "requeue", "drop"]
    ),
    "many long words": swept(servers=[f"{n}x16@50" for n in range(1, 13)]),
}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    module.draw(CASES["two axes"], path)
    pixels = imread(path)
    assert pixels.shape[:2] == (1050, 1500)
    seen = {tuple(pixel) for pixel in pixels[::3, ::3, :3].reshape(-1, 3).tolist()}
    wanted = {to_rgb(colour) for colour in module.COLOURS[:4]}  # one for each policy
    assert all(any(math.dist(one, other) < 0.01 for other in seen) for one in wanted)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_no_words_lie_over_others_or_outside(
    settings: list[Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    module.draw(settings, Path("out.png"))
    boxes = words(drawn[0], monkeypatch)
    assert len(boxes) > 20
    width, height = drawn[0].canvas.get_width_height()
    outside = [t for t, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]
    assert not outside
    level = [(text, box) for text, box in boxes if text.get_rotation() in (0, 90)]
    over = [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in combinations(level, 2)
        if Bbox.intersection(a, b) is not None
    ]
    assert not over


def words(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Text, Bbox]]:
    """Every text that is drawn, and where. Ticks beyond the end of an axis are there, undrawn."""
    drawn: dict[Text, None] = {}
    draw = Text.draw

    def note(text: Text, renderer: Any) -> None:
        drawn[text] = None
        draw(text, renderer)

    canvas = FigureCanvasAgg(figure)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", note)
        canvas.draw()  # type: ignore[no-untyped-call]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    seen = [text for text in drawn if text.get_text().strip() and text.get_visible()]
    return [(text, text.get_window_extent(renderer).padded(-1)) for text in seen]


def test_the_legend_of_the_histograms_lies_over_no_bar() -> None:
    figure = Figure()
    axes = figure.subplots()
    module._draw_staleness(axes, outcome(oldest=0))  # one bar of each, as high as can be
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    legend = axes.get_legend()
    assert legend is not None
    box = legend.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
    bars = [bar.get_window_extent() for bar in axes.patches]
    assert len(bars) == 2
    assert all(Bbox.intersection(box, bar) is None for bar in bars)
    assert axes.get_yticks().max() == pytest.approx(1)


@pytest.mark.parametrize("kinds", [12, 100])
def test_a_title_names_what_two_lines_hold_of_a_fleet(kinds: int) -> None:
    *servers, speed = module._title(of_kinds(kinds), outcome()).split("\n")
    assert speed == "5,000 tokens/s, 4.40 rollouts/s trained on"
    assert len(servers) == 2
    named = " ".join(servers).removeprefix("servers ").split(", ")
    assert named[:12] == [f"{n}x16@50" for n in range(1, 13)]
    assert (named[-1] == "…") == (kinds == 100)


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(0.0, "1.0"), (0.5, "0.5"), (8.0, "8"), (900.0, "800"), (5000.0, "5k"), (2e6, "2M")],
)
def test_an_axis_from_zero_is_written_as_people_say_it(most: float, ticks: str) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [most / 2, most])
    module._from_zero(axes)
    figure.draw_without_rendering()
    written = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks in written
    assert not any(text.endswith("m") for text in written)
    assert axes.get_ylim()[0] == 0


def test_of_more_kinds_than_there_is_room_for_the_extremes_are_drawn() -> None:
    axes = Figure().subplots()
    module._draw_busy(axes, outcome(kinds=[f"{n}x1@1" for n in range(1, 16)]))
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "all servers", "busiest: 15x1@1", "least busy: 1x1@1",
    ]  # fmt: skip


def test_axes_are_named() -> None:
    figure = Figure()
    module._several(figure, [(s, outcome()) for s in CASES["two axes"]])
    assert all(axes.get_xlabel() == "max_staleness" for axes in figure.axes)
    assert [axes.get_title() for axes in figure.axes] == [
        "Throughput", "Servers busy", "The trainer waits", "Staleness",
    ]  # fmt: skip
    assert all(axes.get_ylabel() for axes in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["wait", "keep", "requeue", "drop"]


def test_what_was_not_finished_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    unfinished = Setting(plan=PLAN, values={"max_staleness": "9"}, outcome=None)
    module.draw([unfinished, unfinished], path)
    assert not path.exists()
    module.draw([*CASES["numbers"][:1], unfinished], path)
    assert path.exists()


def test_matplotlib_is_imported_for_a_picture_alone() -> None:
    code = "import arealtrio.cli, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
