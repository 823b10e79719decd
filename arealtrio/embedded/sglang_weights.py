"""What SGLang is told about weights: from disk, over the trainer's network, and how to label them.

There is no trainer's network here: ``/update_weights_from_distributed`` checks what is announced,
that its group was initialised and that an update session is open, remembers the tensors, and
answers as a server that received them. The weights stay what they are.

Sources: recordings update_weights_* in tests/golden/sglang-0.5.23; for the distributed routes,
which are not recorded, the server's own code (managers/scheduler_components/weight_updater.py).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from .scheduler import EngineDead
from .sglang_error import Json, engine_died, failed
from .sglang_frontend import Frontend
from .tensors import tensors

NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or "
    "queued. Retract or finish them, then call /flush_cache."
)
NO_SESSION = (
    "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
)


class FromDisk(msgspec.Struct):
    """The body of ``/update_weights_from_disk``."""

    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class FromDistributed(msgspec.Struct):
    """The body of ``/update_weights_from_distributed``."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class InitGroup(msgspec.Struct):
    """The body of ``/init_weights_update_group``."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroup(msgspec.Struct):
    """The body of ``/destroy_weights_update_group``."""

    group_name: str = "weight_update_group"


class Label(msgspec.Struct):
    """The body of ``/update_weight_version``."""

    new_version: str
    abort_all_requests: bool = True


class Weights:
    """The weight routes, over one front end. What fails raises SglangError.

    Args:
        front: Holds requests back while weights are loaded outside a pause.
    """

    def __init__(self, front: Frontend) -> None:
        self._front = front
        self._groups: dict[str, InitGroup] = {}
        self._in_session = False

    async def from_disk(self, body: FromDisk) -> Json:
        """Load a directory. A failure leaves the old weights in service, except one to flush."""
        if body.abort_all_requests:
            self._front.engine.abort()
        async with self._front.gate.load():
            await self._load(body)
            if body.flush_cache and not self.can_flush():
                raise failed(NOT_FLUSHED, num_paused_requests=0)
        self._front.model_path = body.model_path
        message = "Succeeded to update model weights." + self._relabelled(body.weight_version)
        return {"success": True, "message": message, "num_paused_requests": 0}

    async def _load(self, body: FromDisk) -> None:
        self._check_there_is_room()
        try:
            await self._front.engine.reload(Path(body.model_path), body.weight_version, fatal=False)
        except EngineDead as exc:
            raise engine_died() from exc
        except OSError as exc:
            message = f"Failed to get weights iterator: {exc}."
            raise failed(message, num_paused_requests=0) from exc
        except ValueError as exc:
            message = f"Failed to update weights: {exc}.\nRolling back to original weights."
            raise failed(message, num_paused_requests=0) from exc

    def _check_there_is_room(self) -> None:
        if "weights" in self._front.released:
            raise self._front.fatal("the memory of the weights is released")

    def can_flush(self) -> bool:
        """Whether nothing uses the cache: nothing runs, and nothing waits unless it is paused."""
        scheduler = self._front.engine.scheduler
        paused = scheduler.pause_mode is not None
        return not scheduler.running and (paused or not scheduler.waiting)

    def _relabelled(self, asked: str | None) -> str:
        """Move the front end's label to the scheduler's, and say so."""
        if asked is None:
            return ""
        self._front.label = self._front.engine.scheduler.weight_version
        return f" Weight version updated to {asked}."

    def label(self, body: Label) -> Json:
        """Label the weights; unless told not to, everything is aborted first."""
        if body.abort_all_requests:
            self._front.engine.abort()
        self._front.engine.set_version(body.new_version)
        self._relabelled(body.new_version)
        message = f"Weight version updated to {body.new_version}"
        return {"success": True, "message": message, "new_version": body.new_version}

    def init_group(self, body: InitGroup) -> Json:
        """Remember a group; a second one of its name takes its place."""
        if not 0 <= body.rank_offset < body.world_size:
            raise failed(
                "Failed to initialize custom process group: rank_offset must be in "
                f"[0, world_size), got {body.rank_offset} of {body.world_size}."
            )
        self._groups[body.group_name] = body
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    def destroy_group(self, body: DestroyGroup) -> Json:
        """Forget a group."""
        if self._groups.pop(body.group_name, None) is None:
            raise failed("The group to be destroyed does not exist.")
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    def begin(self) -> Json:
        """Open a session, without which nothing is taken from the network."""
        if self._in_session:
            raise failed("a weight-update session is already open; call end_weight_update() first")
        self._in_session = True
        return {"success": True, "message": "Success"}

    def end(self) -> Json:
        """Close it."""
        if not self._in_session:
            raise failed("no weight-update session is open; call begin_weight_update() first")
        self._in_session = False
        return {"success": True, "message": "Success"}

    async def from_distributed(self, body: FromDistributed) -> Json:
        """Take what was announced as received."""
        if body.abort_all_requests:
            self._front.engine.abort()
        async with self._front.gate.load():
            self._receive(body)
            if body.flush_cache and not self.can_flush():
                raise failed(NOT_FLUSHED)
        message = "Succeeded to update parameter online." + self._relabelled(body.weight_version)
        return {"success": True, "message": message}

    def _receive(self, body: FromDistributed) -> None:
        if not self._in_session:
            raise failed(NO_SESSION)
        self._check_there_is_room()
        engine = self._front.engine
        try:
            self._check_group(body.group_name)
            engine.faults.on_load()
            engine.announced += tensors(body.names, body.dtypes, body.shapes)
        except (OSError, ValueError) as exc:
            raise failed(f"Failed to receive weights: {exc}") from exc
        if body.weight_version is not None:
            engine.set_version(body.weight_version)

    def _check_group(self, name: str) -> None:
        if name not in self._groups:
            raise ValueError(
                f"Group {name} not in {list(self._groups)}. "
                "Please call `init_weights_update_group` first."
            )
