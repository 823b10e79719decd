"""Every block of Python in the README and in docs/ runs; every name they link to is there."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

import arealtrio
from arealtrio.demo.fleet import server_processes
from arealtrio.embedded.model import TinyModel

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
BEGINNING = ROOT / "docs" / "index.md"  # its first block is what the other pages build on
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")


class Letters:
    """A tokenizer: a letter is a token."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % 60 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(64 + token) for token in ids)


class Checkpoints:
    """Directories with weights: the same ones under every version."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._model = TinyModel.random(0, vocab_size=64, eos_id=0)

    def __call__(self, version: int) -> Path:
        path = self._root / f"v{version}"
        self._model.save(path)
        return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def urls(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    logs = tmp_path_factory.mktemp("logs")
    with server_processes(2, checkpoint(0), logs, ["--max-num-seqs", "64"]) as servers:
        yield [server.url for server in servers]


def blocks(page: Path) -> list[str]:
    """A page's blocks, each behind as many empty lines that tracebacks name the page's own."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1] for found in BLOCK.finditer(text)]


def run(page: Path, source: str, names: dict[str, Any]) -> None:
    """Run a block, and the ``main`` that it defines, if any."""
    names.pop("main", None)
    exec(compile(source, str(page), "exec"), names)
    if inspect.iscoroutinefunction(names.get("main")):
        trio.run(names["main"])


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the reader's."""
    (tmp_path / "my_rewards.py").write_text("def grade(*args, **data):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(
    page: Path, urls: list[str], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    names: dict[str, Any] = {"urls": urls, "checkpoint": checkpoint, "scratch": tmp_path / "model"}
    if page != BEGINNING:
        run(BEGINNING, blocks(BEGINNING)[0], names)
    for source in blocks(page):
        run(page, source, names)


def test_the_code_of_the_readme_runs(urls: list[str], checkpoint: Checkpoints) -> None:
    """For two servers that are there, an eighth of the size, with what it takes from its reader."""
    (source,) = blocks(README)
    for pretended, real in (
        ('["http://10.0.0.1:8000", "http://10.0.0.2:8000"]', repr(urls)),
        ("max_concurrent_rollouts=512", "max_concurrent_rollouts=64"),
        ("consumer_batch_size=64", "consumer_batch_size=8"),
    ):
        assert pretended in source
        source = source.replace(pretended, real)
    trained: list[Any] = []
    saved: list[Path] = []
    names: dict[str, Any] = {
        "tokenizer": Letters(),
        "dataloader": [{"prompt": chr(65 + n % 26), "answer": "A"} for n in range(256)],
        "steps": 2,
        "train": trained.append,
        "save": saved.append,
        "path": checkpoint(1),
    }
    run(README, source, names)
    assert [len(batch["rewards"]) for batch in trained] == [8 * 8] * 2
    assert len(saved) == 2


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_index_lists_every_page() -> None:
    assert {BEGINNING.parent / link for link in LINK.findall(BEGINNING.read_text())} == {
        page for page in PAGES if page != BEGINNING
    }


CODE = re.compile(r"`(?:\w+\.)*(\w+?)(?:=[^`]*|\([^`]*\))?`")


def known_names() -> set[str]:
    """What prose may name in the form of an option: config fields, arguments, attributes."""
    public = [getattr(arealtrio, name) for name in arealtrio.__all__]
    methods = [
        method for one in public if inspect.isclass(one) for _, method in inspect.getmembers(one)
    ]
    arguments = {
        name
        for one in (*public, *methods)
        if inspect.isfunction(one)
        for name in inspect.signature(one).parameters
    }
    members = {name for one in public if inspect.isclass(one) for name in dir(one)}
    records = {f.name for one in public if is_dataclass(one) for f in fields(one)}
    return arguments | members | records | set(arealtrio.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_limits_named_in_prose_are_limits_of_this_version(page: Path) -> None:
    """Names with a unit, or a ``max_`` and the like: what a reader would put into a config."""
    prose = BLOCK.sub("", page.read_text())
    wanted = {n for n in CODE.findall(prose) if re.search(r"^max_|_s$|_size$|_ratio$|^min_", n)}
    theirs = {"max_num_seqs", "max_running_requests", "max_head_offpolicyness"}  # not ours
    assert wanted <= known_names() | theirs


CALL = re.compile(r"`(\w+)(\([^`]+\))`")


def calls_in_prose(page: Path) -> Iterator[ast.Call]:
    """Each call of a public name between backticks, an ellipsis read as some value."""
    for name, arguments in CALL.findall(BLOCK.sub("", page.read_text())):
        if name in arealtrio.__all__:
            call = ast.parse(name + arguments.replace("…", "..."), mode="eval").body
            assert isinstance(call, ast.Call)
            yield call


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_calls_in_prose_fit_what_they_call(page: Path) -> None:
    for call in calls_in_prose(page):
        assert isinstance(call.func, ast.Name)
        called = inspect.signature(getattr(arealtrio, call.func.id))
        called.bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})


def test_there_are_calls_in_prose() -> None:
    assert sum(1 for page in PAGES for _ in calls_in_prose(page)) > 2
