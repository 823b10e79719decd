from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from arealtrio.errors import UsageError
from arealtrio.loader import LoaderFeed


def numbered(*numbers: int) -> list[dict[str, Any]]:
    return [{"n": number} for number in numbers]


def test_prompts_come_in_order_and_fewer_only_at_the_end() -> None:
    feed = LoaderFeed(numbered(0, 1, 2, 3, 4))
    assert feed.take(2) == numbered(0, 1)
    assert not feed.exhausted
    assert feed.take(3) == numbered(2, 3, 4)
    assert feed.take(3) == []
    assert feed.exhausted


def test_no_more_is_read_than_asked_for() -> None:
    source = iter(numbered(0, 1, 2))
    LoaderFeed(source).take(2)
    assert list(source) == numbered(2)


def test_lists_are_taken_apart() -> None:
    feed = LoaderFeed([numbered(0, 1, 2), [], tuple(numbered(3)), numbered(4)[0]])
    assert feed.take(1) == numbered(0)
    assert feed.take(9) == numbered(1, 2, 3, 4)
    assert feed.exhausted


def test_it_is_not_exhausted_while_what_was_read_is_there() -> None:
    feed = LoaderFeed(numbered(0, 1))
    feed.read(9)
    assert not feed.exhausted
    assert feed.pop(1) == numbered(0)
    assert feed.pop(9) == numbered(1)
    assert feed.exhausted


class Lazy(Mapping[str, Any]):
    """A prompt that reads its file when it is looked at."""

    def __getitem__(self, key: str) -> Any:
        raise OSError("no such image")

    def __iter__(self) -> Iterator[str]:
        return iter(["image"])

    def __len__(self) -> int:
        return 1


class Nameless:
    def __str__(self) -> str:
        raise OSError("no name")


@pytest.mark.parametrize("broken", [Lazy(), {"prompt_id": Nameless()}])
def test_a_prompt_that_can_not_be_looked_at_costs_no_other(broken: Any) -> None:
    feed = LoaderFeed([*numbered(0, 1), broken, *numbered(2)])
    with pytest.raises(OSError, match="no "):
        feed.take(4)
    assert feed.take(4) == numbered(0, 1, 2)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_an_error_arrives_as_itself_and_what_was_read_is_kept(error: BaseException) -> None:
    class Stumbles:
        def __init__(self) -> None:
            self.steps: Iterator[Any] = iter([*numbered(0, 1), error, *numbered(2)])

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return self

        def __next__(self) -> dict[str, Any]:
            step = next(self.steps)
            if isinstance(step, BaseException):
                raise step
            return dict(step)

    feed = LoaderFeed(Stumbles())
    with pytest.raises(type(error)):
        feed.take(3)
    assert not feed.exhausted
    assert feed.take(9) == numbered(0, 1, 2)


@pytest.mark.parametrize("item", [3, "prompt", None, [1, 2], [{"n": 1}, 2]])
def test_what_is_no_prompt_is_refused_by_its_type_alone(item: Any) -> None:
    feed = LoaderFeed([item, *numbered(1)])
    with pytest.raises(UsageError, match=type(item).__name__):
        feed.take(1)
    assert feed.take(1) == numbered(1)


def test_the_loader_is_iterated_once() -> None:
    calls = []

    class Loader:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            calls.append(1)
            return iter(numbered(0, 1))

    feed = LoaderFeed(Loader())
    assert not calls  # not before the first read: that is in the reader's thread
    assert not feed.begun
    feed.take(1)
    feed.take(1)
    assert calls == [1]
    assert feed.begun


def test_one_that_can_not_begin_may_begin_later() -> None:
    class Loader:
        def __init__(self) -> None:
            self.errors = [OSError("no workers")]

        def __iter__(self) -> Iterator[dict[str, Any]]:
            if self.errors:
                raise self.errors.pop()
            return iter(numbered(0))

    feed = LoaderFeed(Loader())
    with pytest.raises(OSError, match="no workers"):
        feed.take(1)
    assert feed.take(1) == numbered(0)


def test_one_of_the_old_protocol_is_a_loader_and_no_iterable_is_none() -> None:
    class Dataset:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return numbered(0, 1)[index]

    assert LoaderFeed(Dataset()).take(9) == numbered(0, 1)  # type: ignore[arg-type]
    for wrong in (5, None, object()):
        with pytest.raises(UsageError, match=f"{type(wrong).__name__} can not"):
            LoaderFeed(wrong)  # type: ignore[arg-type]
