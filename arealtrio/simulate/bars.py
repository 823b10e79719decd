"""Bars for a terminal: eighths of a character where it can show them, else whole ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ACROSS = "▏▎▍▌▋▊▉█"
_UP = "▁▂▃▄▅▆▇█"


def bar(share: float, width: int, *, plain: bool = False) -> str:
    """Return a bar of ``share`` of ``width`` columns, padded to all of them.

    Args:
        share: 0 to 1. Anything above 0 shows.
        width: In columns.
        plain: Use ASCII alone.
    """
    if plain:
        return ("#" * min(width, round(share * width) or (share > 0))).ljust(width)
    eighths = min(8 * width, round(8 * share * width) or (share > 0))
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_ACROSS[rest - 1] if rest else "")).ljust(width)


def columns(shares: Sequence[float], *, plain: bool = False) -> str:
    """Return one upright bar for each share, as high as it is beside the largest; ``·`` is none."""
    most = max(shares, default=0) or 1
    levels = "123456789"[:8] if plain else _UP
    none = "." if plain else "·"
    return "".join(levels[min(7, int(8 * s / most))] if s > 0 else none for s in shares)


def binned(histogram: Mapping[int, int], most: int) -> dict[str, float]:
    """Return the shares of a histogram from 0 to its largest key, in ``most`` bins at most.

    Args:
        histogram: Counts by a key of at least 0.
        most: Bins; with more keys several share one, each bin as many.

    Returns:
        The share of each bin by its name: ``3``, or ``4-7``.
    """
    total, last = sum(histogram.values()), max(histogram, default=0)
    wide = last // most + 1
    bins = {_name(first, wide): 0.0 for first in range(0, last + 1, wide)}
    for key, count in histogram.items():
        bins[_name(key - key % wide, wide)] += count / total
    return bins


def _name(first: int, wide: int) -> str:
    return f"{first}" if wide == 1 else f"{first}-{first + wide - 1}"
