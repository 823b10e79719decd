"""Adapters: which version of each LoRA adapter requests are to name, and which are still in use.

Decided in one place and synchronously, so that every request sent after an instant names the new
version, on every server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import trio

_NO_ADAPTER = nullcontext("")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter.

    Args:
        name: Without the version.
        path: Its directory, as the servers see it; empty of one that the trainer sent.
        version: The weight version that it makes.
    """

    name: str
    path: str
    version: int

    @property
    def served_name(self) -> str:
        """What requests call it: AReaL's ``<name>-v<version>``."""
        return f"{self.name}-v{self.version}"


class Adapters:
    """The adapters of a pool, by name.

    Attributes:
        changed: Set when one may have become free to be unloaded; a new event each time.
    """

    def __init__(self) -> None:
        self.changed = trio.Event()
        self._current: dict[str, Adapter] = {}
        self._retired: list[Adapter] = []
        self._in_use: Counter[str] = Counter()

    @property
    def current(self) -> tuple[Adapter, ...]:
        """What a server in service has, each of the newest version."""
        return tuple(self._current.values())

    def switch(self, name: str, path: str, version: int) -> None:
        """Let requests name this version from now on; the one before it is retired."""
        new = Adapter(name, path, version)
        old = self._current.get(name)
        self._current[name] = new
        self._retired = [one for one in self._retired if one.served_name != new.served_name]
        if old is not None and old.served_name != new.served_name:
            self._retired.append(old)
            self._notify()

    def using(self, name: str) -> AbstractContextManager[str]:
        """Keep the current version of an adapter loaded for the length of a ``with`` block.

        Returns:
            What yields the name to ask for; ``name`` itself where no update brought it: then it is
            one that the server was started with.
        """
        return self._using(name) if name else _NO_ADAPTER

    @contextmanager
    def _using(self, name: str) -> Iterator[str]:
        adapter = self._current.get(name)
        served_name = adapter.served_name if adapter else name
        self._in_use[served_name] += 1
        try:
            yield served_name
        finally:
            self._in_use[served_name] -= 1
            if not self._in_use[served_name]:
                del self._in_use[served_name]
                self._notify()

    def is_versioned(self, name: str) -> bool:
        """Whether an update brought it."""
        return name in self._current

    def take_unused(self) -> list[Adapter]:
        """The retired ones that no request uses; they are the caller's to unload."""
        unused = [one for one in self._retired if not self._in_use[one.served_name]]
        self._retired = [one for one in self._retired if one not in unused]
        return unused

    def _notify(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()
