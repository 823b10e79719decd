"""What ``import arealtrio`` offers: sorted, present, documented."""

from __future__ import annotations

import inspect

import arealtrio


def documented(value: object, name: str) -> bool:
    """Say whether a class or function has a docstring that somebody wrote for it."""
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    text = str(own or "")
    return bool(text) and not text.startswith(f"{name}(")  # what a dataclass writes for itself


def test_names_are_sorted_and_unique() -> None:
    assert list(arealtrio.__all__) == sorted(set(arealtrio.__all__))


def test_every_public_name_is_there_and_documented() -> None:
    values = {name: getattr(arealtrio, name) for name in arealtrio.__all__}
    definitions = {n: v for n, v in values.items() if inspect.isclass(v) or inspect.isroutine(v)}
    assert [n for n, v in definitions.items() if not documented(v, n)] == []


def test_nothing_public_is_left_out() -> None:
    """What is ours and has no underscore is in ``__all__``; rooms are found by their own names."""
    ours = {
        name
        for name, value in vars(arealtrio).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert ours == {name for name in arealtrio.__all__ if not name.startswith("_")}
