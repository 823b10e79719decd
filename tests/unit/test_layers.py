"""The map of the house: what each room may import. Read from the sources; nothing is imported.

A *room* is a module or package directly in ``arealtrio``. Imports inside functions and under
``TYPE_CHECKING`` count like any other: to know a name is to depend on it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "arealtrio"

# Each line is a floor. A room imports from the floors below its own, never from its own or above.
TOP = (
    ("__main__",),
    ("cli",),
    ("demo", "simulate"),
    ("controller",),
    ("executor",),
    ("server_face",),
    ("assembly", "rollouts"),
    ("recording",),
    ("admission", "arguments", "batching", "consumption", "recorded_feed", "results", "status"),
    ("lateness",),
    ("groups",),
    ("delivery", "failures", "group_policy", "loader", "rollout_engine", "settlement"),
)
# Under the executor are two wings that know nothing of each other.
SERVING_WING = (
    ("engine", "weights"),
    ("generation", "joining", "pressure", "provenance", "supervision"),
    ("leftovers", "lora", "memory"),
    ("restarts",),
    ("servers",),
    ("ejection", "pausing"),
    ("fleet",),
    ("adapters", "experts", "leases", "server"),
    ("ordering", "scheduling", "transport", "wire"),
    ("affinity", "lengths", "tally"),
)
DATA_WING = (
    ("ledger",),
    ("containment",),
    ("asyncio_workflow", "reward", "staleness", "trajectory", "workflow"),
    ("reward_worker",),
    ("rows", "to_torch"),
)
# Under both wings.
FOUNDATION = (
    ("bridge", "lifetime", "stall", "waiting", "watch"),
    ("config",),
    ("types",),
    ("checks", "command_line"),
    ("_core", "errors"),
)
# Servers to be tested against; they stand beside the house, and only the demo looks in.
BESIDE = (
    ("testing",),
    ("embedded",),
)
SEES_BESIDE = {
    "cli": "embedded",
    "demo": "embedded testing",
    "simulate": "testing",
    "testing": "executor recording transport wire",  # a Transport, and runs of the whole house
}

# The one door through which each outside library comes in.
DOORS = {
    "click": "cli command_line embedded simulate",
    "httptools": "transport",
    "httpx": "transport embedded testing",
    "hypercorn": "embedded",
    "matplotlib": "simulate",
    "msgspec": "types wire embedded ledger",
    "numpy": "*",
    "outcome": "controller leases waiting",  # what a waiter is woken with
    "starlette": "embedded",
    "trio": (  # the other rooms decide; they never wait
        "asyncio_workflow bridge cli demo controller executor rollouts rollout_engine lifetime "
        "waiting engine weights supervision joining servers server fleet pausing pressure leases "
        "transport reward workflow embedded testing watch stall adapters lora memory simulate "
        "ledger recording containment"
    ),
    "trio_asyncio": "asyncio_workflow",
    "trio_parallel": "reward",
    # Of the standard library: threads, processes and sockets have doors too.
    "asyncio": "asyncio_workflow",
    "concurrent": "controller",
    "http": "",
    "multiprocessing": "reward_worker",
    "requests": "",
    "sqlite3": "ledger",
    "socket": "transport embedded",
    "ssl": "transport",
    "subprocess": "demo",
    "threading": "controller staleness",  # staleness: for the public `lock` that AReaL has
    "urllib3": "",
}
# Heavy guests come in only through a module that has their name, which nothing else needs.
GUESTS = ("pytest", "ray", "torch")


def rooms_below(wing: tuple[tuple[str, ...], ...]) -> dict[str, frozenset[str]]:
    """Map each room of a stack of floors to the rooms on the floors below it."""
    return {
        room: frozenset(r for floor in wing[level + 1 :] for r in floor)
        for level, floor in enumerate(wing)
        for room in floor
    }


def may_import() -> dict[str, frozenset[str]]:
    """Map each room to the rooms it may import."""
    foundation = rooms_below(FOUNDATION)
    table = dict(foundation)
    for wing in (SERVING_WING, DATA_WING, BESIDE):
        for room, below in rooms_below(wing).items():
            table[room] = below | foundation.keys()
    under_executor = frozenset(r for w in (SERVING_WING, DATA_WING) for floor in w for r in floor)
    for room, below in rooms_below(TOP).items():
        table[room] = below | under_executor | foundation.keys()
    for room, more in SEES_BESIDE.items():
        table[room] |= frozenset(more.split())
    return table


MAY_IMPORT = may_import()


@dataclass(frozen=True)
class Import:
    """One import as written: the module that asks, and the dotted name it asks for."""

    importer: str
    name: str
    line: int

    @property
    def room(self) -> str:
        """The room of the module that asks; empty for the package's own ``__init__``."""
        return room_of(self.importer)

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name}"


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[Import]:
    """Yield every import of a source file, with relative names made absolute."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(module, n, node.lineno) for n in imported_names(node, package))


def imported_names(node: ast.ImportFrom, package: str) -> Iterator[str]:
    """Yield what ``from x import y`` may mean; ``from . import y`` names a room by y."""
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *filter(None, [node.module])])
    if base == "arealtrio":
        yield from (f"arealtrio.{alias.name}" for alias in node.names)
    else:
        yield base


SOURCES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyi"))
IMPORTS = [found for path in SOURCES for found in imports_of(path)]
INSIDE = [i for i in IMPORTS if i.name.split(".")[0] == "arealtrio" and i.room]
OUTSIDE = [i for i in IMPORTS if i.name.split(".")[0] != "arealtrio"]


def test_every_module_has_a_room_on_the_map() -> None:
    rooms = {room_of(module_name(path)) for path in SOURCES} - {""}
    assert rooms <= MAY_IMPORT.keys(), "give the new room its floor in this file, and in the design"
    assert rooms >= MAY_IMPORT.keys(), "take the room that is gone off the map"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_down(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = [i for i in INSIDE if i.room == room and room_of(i.name) not in allowed]
    assert not wrong, "upward or sideways: " + "; ".join(map(str, wrong))


def test_no_dialect_knows_another() -> None:
    dialects = {"arealtrio.wire.sglang", "arealtrio.wire.vllm"}
    wrong = [i for i in INSIDE if i.importer in dialects and i.name in dialects]
    assert not wrong, "; ".join(map(str, wrong))


def comes_through_its_door(outside: Import) -> bool:
    library = outside.name.split(".")[0]
    if library in GUESTS:
        return library in outside.importer.rpartition(".")[2].split("_")
    if library in DOORS:
        return outside.room in DOORS[library].split() or DOORS[library] == "*"
    return library in sys.stdlib_module_names


def test_outside_libraries_come_through_their_doors() -> None:
    wrong = [i for i in OUTSIDE if not comes_through_its_door(i)]
    assert not wrong, "no door there for: " + "; ".join(map(str, wrong))


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["asyncio"], *extras["plot"]]
    declared = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in wanted}
    used = {i.name.split(".")[0] for i in OUTSIDE} - sys.stdlib_module_names - set(GUESTS)
    assert used <= declared, "another package brings it along today: declare it in pyproject.toml"


def test_the_map_is_a_check_at_all() -> None:
    """The rules above would hold of an empty list, and of a table that allows everything."""
    assert len(INSIDE) > 10
    assert "servers" in MAY_IMPORT["engine"]
    assert "engine" not in MAY_IMPORT["servers"]
    assert "engine" not in MAY_IMPORT["weights"]
    assert not MAY_IMPORT["trajectory"] & {"staleness", "workflow", "reward", "servers", "wire"}
    assert not comes_through_its_door(Import("arealtrio.engine", "httpx", 1))
    assert not comes_through_its_door(Import("arealtrio.trajectory", "torch", 1))
    assert not comes_through_its_door(Import("arealtrio.engine", "pandas", 1))
    assert comes_through_its_door(Import("arealtrio.transport", "httptools", 1))


ISLANDS = sorted((ROOT / "_core").glob("*.pyx"))
# `from x import y`, `from x cimport y`, `import x, y`, `cimport x`, `include "x"`
CYTHON_IMPORT = re.compile(r"^\s*(?:(?:from|import|cimport)\s+([\w.]+)|include\s+['\"](.+)['\"])")


@pytest.mark.parametrize("island", ISLANDS, ids=lambda path: path.stem)
def test_an_island_is_an_island(island: Path) -> None:
    """Compiled files import nothing from arealtrio and do not cimport each other."""
    stems = {path.stem for path in ISLANDS} | {"arealtrio", "_core"}
    for number, line in enumerate(island.read_text().splitlines(), 1):
        if found := CYTHON_IMPORT.match(line):
            name = found[1] or found[2]
            ours = name.startswith(".") or name.split(".")[0] in stems
            assert not ours, f"{island.name}:{number} imports {name}"


@pytest.mark.parametrize("island", ISLANDS, ids=lambda path: path.stem)
def test_an_island_has_a_stub(island: Path) -> None:
    assert (PACKAGE / "_core" / f"{island.stem}.pyi").is_file()
