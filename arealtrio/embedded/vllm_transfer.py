"""vLLM's weight transfer: init, start, any number of updates, finish.

Two kinds of ``update_info`` are understood. ``{"path": …}`` is that of a file backend, as the
recordings used one: weights are loaded from a directory (or from the directory of a file) below
``init_info["root"]``. ``{"names": …, "dtype_names": …, "shapes": …}`` is that of the NCCL backend:
there is no such network here, so it is checked and remembered, and the weights stay what they are.

Source: recordings wt_*, rc_*, ku_*, err_*_no_start in tests/golden/vllm-0.32.0; for NCCL, which is
not recorded, vllm/distributed/weight_transfer/nccl_engine.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .engine import Engine
from .scheduler import EngineDead
from .tensors import Tensor, tensors
from .vllm_error import engine_error, missing, rpc_error
from .vllm_fields import Body, text
from .vllm_response import Json

T = TypeVar("T")


class _NcclInit(msgspec.Struct):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


class _NcclUpdate(msgspec.Struct):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class WeightTransfer:
    """The state between the four requests of an update.

    Args:
        engine: Whose weights are updated.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._root = Path()
        self._group: _NcclInit | None = None
        self._open = False

    def initialise(self, body: Body) -> Json:
        """Say where weights come from: a root directory, or a process group."""
        info = _part(body, "init_info")
        if "master_address" in info:
            self._group = _read(info, _NcclInit)
        self._root = Path(str(info.get("root") or "."))
        return {"message": "Weight transfer initialized"}

    def start(self) -> Json:
        """Open an update; one that is open already stays open, as after a failed ``update``."""
        self._open = True
        return {"message": "Weight update started"}

    async def update(self, body: Body) -> Json:
        """Take weights; a failure poisons the engine."""
        info = _part(body, "update_info")
        if not self._open:
            raise rpc_error("start_weight_update must be called before update_weights.")
        if "path" in info:
            await self._load(self._root / str(info["path"]))
        else:
            self._engine.announced += self._announced(info)
        return {"message": "Weights updated"}

    def finish(self, body: Body) -> Json:
        """Close the update; with ``weight_version``, label the weights."""
        label = text(body, "weight_version")
        if not self._open:
            raise rpc_error("finish_weight_update called without a matching start_weight_update.")
        self._open = False
        if label is not None:
            self._engine.set_version(label)
        return {"message": "Weight update finished"}

    async def _load(self, path: Path) -> None:
        directory = path.parent if path.suffix else path
        try:
            await self._engine.reload(directory, fatal=True)
        except EngineDead as exc:
            raise engine_error() from exc
        except FileNotFoundError as exc:
            raise rpc_error(f"No such file or directory: {path}") from exc
        except (OSError, ValueError) as exc:
            raise rpc_error(str(exc)) from exc

    def _announced(self, info: Body) -> list[Tensor]:
        if self._group is None:
            raise rpc_error(
                "NCCL weight transfer not initialized. Call init_transfer_engine() first."
            )
        update = _read(info, _NcclUpdate)
        try:
            self._engine.faults.on_load()
            return tensors(update.names, update.dtype_names, update.shapes)
        except (OSError, ValueError) as exc:
            self._engine.scheduler.poison()
            raise rpc_error(str(exc)) from exc


def _part(body: Body, name: str) -> Body:
    part: Any = body.get(name)
    if not isinstance(part, dict):
        raise missing(name)
    return part


def _read(info: Body, kind: type[T]) -> T:
    """Read an info; where a field is missing or wrong the worker fails, as its dataclass would."""
    try:
        return msgspec.convert(info, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise rpc_error(str(exc)) from exc
