"""What a run keeps on the disk, so that the same command goes on after whatever ended it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ..errors import ConfigError

FORMAT = 1
FILE = "checkpoint.json"
_BESIDE = "checkpoint.new"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A run between two steps. All of it is plain data; float32 survives JSON exactly.

    Args:
        options: Those of the run, by name.
        trainer: The trainer's ``state_dict``; None before the first step.
        tally: The ``Tally`` of the steps so far, as a dict.
        rollout: The controller's ``state_dict``, which belongs to the ledger.
        report: The ``DemoReport`` as a dict, once the run is finished.
    """

    options: Mapping[str, Any]
    trainer: Mapping[str, Any] | None = None
    tally: Mapping[str, Any] | None = None
    rollout: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``write`` left at ``path``.

        Raises:
            ConfigError: The file is something else.
            OSError: It can not be read.
        """
        try:
            values = json.loads(path.read_bytes())
            known = values.pop("format") == FORMAT and isinstance(values["options"], dict)
            if known:
                return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            known = False
        raise ConfigError(f"{path} is no checkpoint of this demo; choose another directory")

    def write(self, path: Path) -> None:
        """Put it at ``path``, whole or not at all; it is on the disk on return."""
        beside = path.with_name(_BESIDE)
        text = json.dumps({"format": FORMAT, **self._as_dict()})
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync(path.parent)

    def _as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """The directory of one run: its checkpoint, its ledger, weights, and the servers' logs.

    Args:
        path: Of the directory.
    """

    path: Path

    @property
    def ledger(self) -> Path:
        """The file of the ledger."""
        return self.path / "ledger"

    @property
    def weights(self) -> Path:
        """Where servers find the weights."""
        return self.path / "weights"

    @property
    def logs(self) -> Path:
        """Where servers write what they have to say."""
        return self.path / "logs"

    @contextmanager
    def opened(self, options: Mapping[str, Any]) -> Iterator[Checkpoint]:
        """Keep others out for the length of a block; the end of this process lets them in, too.

        Args:
            options: Those of the run, which have to be the checkpoint's.

        Yields:
            The checkpoint to go on from; in a new or an empty directory, a first one.

        Raises:
            ConfigError: The directory holds another run, or something else; or another process
                has it open.
            OSError: It can not be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(handle)
            yield self._found(options)
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path} is in use by another process; wait for its end, or choose another "
                "directory"
            ) from None

    def _found(self, options: Mapping[str, Any]) -> Checkpoint:
        if (self.path / FILE).exists():
            found = Checkpoint.read(self.path / FILE)
            self._check(found.options, options)
            return found
        if any(entry.name != _BESIDE for entry in self.path.iterdir()):
            raise ConfigError(
                f"{self.path} is not empty and holds no run of this demo; choose an empty "
                "directory, or a new one"
            )
        first = Checkpoint(options=options)
        self.write(first)
        return first

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        checkpoint.write(self.path / FILE)

    def _check(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"{self.path} holds a run with {name} {theirs.get(name)}, not {value}: go on "
                    "with the options that it was begun with, or choose another directory"
                )


def _sync(directory: Path) -> None:
    """Make a rename in it survive a loss of power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
