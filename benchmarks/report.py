"""All questions in short, as one table and one file: ``python -m benchmarks.report --json PATH``.

Under ten minutes on two cores. In every row less is better: ``ratio`` is ours ÷ baseline, and where
there is no baseline the value itself, in its unit.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import orjson

from arealtrio.command_line import PathOption
from arealtrio.trajectory import CollateBuffers
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

from . import (
    bench_batch,
    bench_counters,
    bench_dispatch,
    bench_end_to_end,
    bench_ledger,
    bench_makespan,
    bench_selection,
    bench_simulation,
    bench_transport,
    bench_wire,
)
from .baseline import compile_empty, medians


class Row(NamedTuple):
    """One line of the table."""

    name: str
    ours: float
    baseline: float | None
    unit: str
    target: float

    @property
    def ratio(self) -> float:
        return self.ours if self.baseline is None else self.ours / self.baseline

    def as_dict(self) -> dict[str, Any]:
        return {
            "ours": self.ours,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "unit": self.unit,
            "target": self.target,
        }


def pair_row(name: str, target: float, unit: str, pair: tuple[float, float]) -> Row:
    return Row(name, pair[0], pair[1], unit, target)


def selection() -> Iterator[Row]:
    limits = {64: (4, 1 / 50), 512: (4, 1 / 200), 4096: (5, 1 / 1000)}
    for servers, (empty, heapify) in limits.items():
        for other, rounds, target in (("empty", 100, empty), ("heapify", 15, heapify)):
            mine, theirs = bench_selection.ours(servers), getattr(bench_selection, other)(servers)
            ours, baseline = medians(mine, theirs, rounds)
            pair = (ours / mine.pairs, baseline / theirs.pairs)
            yield pair_row(f"selection, n={servers} ÷ {other}", target, "s/pair", pair)


def counters() -> Iterator[Row]:
    nothing = bench_counters.calls(compile_empty()().try_submit)
    for name in ("try_submit", "submit", "accept", "reject", "enqueue"):
        ours = bench_counters.calls(getattr(bench_counters.ours(), name))
        pair = medians(ours, nothing, 100)
        yield pair_row(f"counters, {name} ÷ empty method", 1.5, "s/5000", pair)
    mine, empty = bench_counters.ours(), compile_empty()()
    pair = medians(
        bench_counters.calls(lambda: mine.capacity),
        bench_counters.calls(lambda: empty.capacity),
        100,
    )
    yield pair_row("counters, capacity ÷ empty property", 1.5, "s/5000", pair)
    ours, theirs = (
        bench_counters.pairs(c) for c in (bench_counters.ours(), bench_counters.locked())
    )
    yield pair_row("submit+settle ÷ lock, 1 thread", 1 / 10, "s/5000", medians(ours, theirs, 50))
    with ThreadPoolExecutor(4) as a, ThreadPoolExecutor(4) as b:
        pair = medians(
            bench_counters.from_threads(bench_counters.ours(), 4, a),
            bench_counters.from_threads(bench_counters.locked(), 4, b),
            5,
        )
    yield pair_row("submit+settle ÷ lock, 4 threads", 1 / 20, "s/200000", pair)


def transport() -> Iterator[Row]:
    t = bench_transport
    ours, aiohttp = t.ours, t.aiohttp_client
    over_ours, stock = t.over_httpx(t.our_pool), t.over_httpx(t.stock_pool)
    with t.delayed_server() as url:
        for name, target, mine, theirs, rounds in (
            ("client, 4096 ÷ 64 in flight", 1.5, (ours, 4096, 3), (ours, 64, 48), 3),
            ("client ÷ aiohttp, 256", 0.7, (ours, 256, 7), (aiohttp, 256, 7), 3),
            ("client ÷ aiohttp, 1024", 0.7, (ours, 1024, 3), (aiohttp, 1024, 3), 3),
            ("httpx on ours ÷ stock, 256", 1 / 5, (over_ours, 256, 5), (stock, 256, 2), 1),
            ("httpx on ours ÷ stock, 1024", 1 / 10, (over_ours, 1024, 1), (stock, 1024, 1), 1),
        ):
            pair = in_turn(url, mine, theirs, rounds)
            yield pair_row(name, target, "s CPU/request", pair)


def in_turn(
    url: str, mine: tuple[Any, int, int], theirs: tuple[Any, int, int], rounds: int
) -> tuple[float, float]:
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, (measure, in_flight, each) in zip(taken, (mine, theirs), strict=True):
            times.append(measure(url, in_flight, each))
    return statistics.median(taken[0]), statistics.median(taken[1])


def wire() -> Iterator[Row]:
    w = bench_wire
    for name, dialect, read, body in (
        ("vllm", VllmDialect(), w.of_completion, w.COMPLETION),
        ("vllm token route", VllmDialect(), w.of_token_route, w.TOKEN_ROUTE),
        ("sglang", SglangDialect(), w.of_sglang, w.SGLANG),
    ):
        ours = w.dialect(dialect, body)
        for other, loads, target in (("json", json.loads, 1 / 6), ("orjson", orjson.loads, 1 / 3)):
            pair = medians(ours, reader(read, loads, body), 15)
            yield pair_row(f"answer, {name} ÷ {other}", target, "s", pair)


def reader(read: Callable[[Any], Any], loads: Callable[..., Any], body: bytes) -> Callable[[], Any]:
    return lambda: read(loads(body))


def end_to_end() -> Iterator[Row]:
    pair = bench_end_to_end.end_to_end(3)
    yield pair_row("request → arrays ÷ aiohttp + json", 1 / 6, "s CPU/request", pair)


def batch() -> Iterator[Row]:
    b = bench_batch
    rows = b.ragged(16384)
    buffers = CollateBuffers()
    source, target = (rows.padded(buffers=buffers) for _ in range(2))
    source, target = ({n: a.copy() for n, a in arrays.items()} for arrays in (source, target))

    def ours() -> object:
        return rows.padded(buffers=buffers)

    pair = medians(ours, lambda: b.pad_and_concatenate(rows), 5)
    yield pair_row("padded ÷ np.pad + concatenate", 1 / 4, "s", pair)
    yield pair_row(
        "padded ÷ memcpy", 1.0, "s", medians(ours, lambda: b.copy_into(target, source), 9)
    )


def dispatch() -> Iterator[Row]:
    d = bench_dispatch
    yield pair_row("trivial rollout ÷ start_soon", 5, "s", d.trivial_rollout_alone())
    taken = d.latencies()
    for name, words in (("start", "submit to start"), ("end", "end to wait")):
        for percentile in ("p50", "p90", "p99"):
            target = 3 if percentile != "p99" else float("inf")
            pair = (taken[name][percentile], taken["portal"][percentile])
            yield pair_row(f"{words} ÷ portal, {percentile}", target, "s", pair)
    yield Row("idle, 4096 waiting", d.idle_cpu(), None, "of a core", 0.002)
    yield Row("memory of a waiting rollout", d.memory(10_000, 1), None, "bytes", 8192)


def ledger() -> Iterator[Row]:
    with_it, without, writes = bench_ledger.ledger_cost(3)
    name = "ledger, CPU a rollout beyond its bytes"
    yield Row(name, (with_it - without - writes) * 1e6, None, "µs CPU", 100)


def makespan() -> Iterator[Row]:
    m = bench_makespan
    seeds = range(m.TRACES)
    for name, fleet in m.FLEETS.items():
        runs = [m.fifo(fleet, seed) for seed in seeds[:10]]
        ratio, idle = statistics.median(r for r, _ in runs), max(i for _, i in runs)
        yield Row(f"fifo ÷ list schedule, {name}", ratio, 1.0, "makespan", 1.02)
        yield Row(f"avoidable idle, {name}", idle, None, "of slots", 0.005)
    for history, words, target in ((True, "an epoch", 1.15), (False, "siblings", 1.25)):
        ratios = [m.longest_first(history=history, seed=seed) for seed in seeds]
        name = f"longest expected ÷ bound, {words}"
        yield Row(name, statistics.median(ratios), 1.0, "makespan", target)
    for name, target in (("8x16", 1.02), ("4x8 + 4x24", 0.75)):
        for case in m.CASES:
            ratios = [m.against_round_robin(m.FLEETS[name], case, seed) for seed in seeds[:5]]
            words = f"{case} ÷ round robin, {name}"
            yield Row(words, statistics.median(ratios), 1.0, "makespan", target)


def simulation() -> Iterator[Row]:
    s = bench_simulation
    for dialect in ("vllm", "sglang"):
        taken = s.cpu_us(dialect=dialect)
        yield Row(f"simulated rollout, {dialect}", taken, None, "µs CPU", s.TARGET_US)


QUESTIONS = (
    selection, counters, transport, wire, end_to_end, batch, dispatch, ledger, makespan, simulation,
)  # fmt: skip


def line(row: Row) -> str:
    target = "" if row.target == float("inf") else f"{row.target:.4g}"
    verdict = "" if not target else "met" if row.ratio <= row.target else "MISSED"
    return f"{row.name:<46} {row.ratio:>10.4g} {target:>8} {verdict:>7}"


@click.command()
@click.option("--json", "path", type=PathOption(), help="Where to write the rows.")
@click.option("--only", multiple=True, type=click.Choice([q.__name__ for q in QUESTIONS]),
              help="One question; may be repeated.")  # fmt: skip
def main(path: Path | None, only: tuple[str, ...]) -> None:
    """Measure everything once, print the table, and write it down."""
    if path is not None and not os.path.isdir(path.parent):  # said before minutes of work
        raise click.BadParameter(f"there is no directory {path.parent}", param_hint="--json")
    rows = {}
    click.echo(f"{'':<46} {'ratio':>10} {'target':>8}")
    for question in QUESTIONS:
        if only and question.__name__ not in only:
            continue
        for row in question():
            click.echo(line(row))
            sys.stdout.flush()
            # JSON knows no infinity: a row without a target is reported, and judged by nobody.
            rows[row.name] = row.as_dict() | (
                {"target": None} if row.target == float("inf") else {}
            )
    if path is not None:
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
