"""The LoRA adapters a server was told to load: names and paths, and no arithmetic.

The tiny model has no adapters. A request that names one is answered by the base weights, so what a
client can see is what both dialects promise about names: an adapter is there from the answer to its
load on, and a name that is not there is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator


class Adapters:
    """Loaded adapters, in the order they were loaded."""

    def __init__(self) -> None:
        self._paths: dict[str, str] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    @property
    def paths(self) -> dict[str, str]:
        """Path by name, a copy."""
        return dict(self._paths)

    def load(self, name: str, path: str) -> None:
        """Take an adapter, or another path for a name that is there.

        Raises:
            FileNotFoundError: ``path`` is no directory; nothing was changed.
        """
        if not os.path.isdir(path):  # pathlib's raises of a name that is too long
            raise FileNotFoundError(f"No adapter found for {path}")
        self._paths[name] = path

    def receive(self, name: str) -> None:
        """Take an adapter that came over a network."""
        self._paths[name] = ""

    def unload(self, name: str) -> None:
        """Forget an adapter; KeyError if it is not there."""
        del self._paths[name]
