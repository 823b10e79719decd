"""WeightUpdate: what the servers are to load, the version it makes, and what came of it."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, TypeAlias

from ..checks import flag, integer, items, one_of, shown, text
from ..errors import UsageError
from ..types import INT32_MAX, PauseMode
from ..wire.weights import AdapterSpec, GroupPlace, TensorSpec, dtype_name

KINDS: Final = ("disk", "distributed", "lora", "label")
# Each dialect knows some. Not ``in_place``: it keeps the cache that the old weights made, for those
# under way and for all that begin alike.
PAUSE_MODES: Final = ("keep", "abort", "wait", "retract")
_RANKS_MAX: Final = 2**20

Chunk: TypeAlias = tuple[TensorSpec, ...]
Send: TypeAlias = Callable[[Chunk], Awaitable[object]]

CHUNK_SIZE_BYTES: Final = 1 << 30  # AReaL's weight_chunked_mem_mb of 1024
DTYPE_SIZE_BYTES: Final = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsGroup:
    """A process group of the trainer, as rank 0, and of the processes of every server.

    Ranks are AReaL's: server i of n begins at ``1 + i · ranks``, in a world of ``n · ranks + 1``,
    where ``ranks`` is ``tp_size · pp_size · dp_size``, or without ``pp_size`` for the group of one
    pipeline stage (``pp_rank``). Source: AReaL, engine/sglang_remote.py, vllm_remote.py.

    Args:
        master_address: The trainer's host, as the servers reach it.
        master_port: A free port there.
        name: Of the group, on the servers.
        backend: Of the network.
        tp_size: Tensor-parallel processes of one server.
        pp_size: Pipeline stages of one server.
        dp_size: Data-parallel engines of one server that the group reaches; vLLM's all have ranks.
        pp_rank: The one stage that this group is of; None: one group for all.
        options: Further fields of the servers' requests, on which both sides must agree, such as
            ``packed`` of vLLM.
        members: The servers in it, by rank. ``init_weights_group`` fills it in.

    Raises:
        UsageError: A value is of another type or out of its range.
    """

    master_address: str
    master_port: int
    name: str = "weight_update_group"
    backend: str = "nccl"
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    pp_rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, most in (
            ("tp_size", _RANKS_MAX),
            ("pp_size", _RANKS_MAX),
            ("dp_size", _RANKS_MAX),
            ("master_port", 65535),
        ):
            value = integer(
                f"{name} of a weights group", getattr(self, name), 1, most, error=UsageError
            )
            object.__setattr__(self, name, value)
        if self.pp_rank is not None:
            value = integer("pp_rank", self.pp_rank, 0, self.pp_size - 1, error=UsageError)
            object.__setattr__(self, "pp_rank", value)
        for name in ("master_address", "name", "backend"):
            text(f"{name} of a weights group", getattr(self, name), error=UsageError)
        if not isinstance(self.options, Mapping):
            raise UsageError(f"options must be a mapping, not {shown(self.options)}")
        members = items("members", self.members, "addresses", error=UsageError)
        checked = tuple(text("each of members", member, error=UsageError) for member in members)
        object.__setattr__(self, "members", checked)

    @property
    def ranks_per_server(self) -> int:
        """Processes of one server that are in it."""
        stages = self.pp_size if self.pp_rank is None else 1
        return self.tp_size * stages * self.dp_size

    @property
    def world_size(self) -> int:
        """All its processes: those of its members, and the trainer."""
        return len(self.members) * self.ranks_per_server + 1

    def place(self, index: int) -> GroupPlace:
        """Where its member ``index`` stands."""
        return GroupPlace(
            master_address=self.master_address,
            master_port=self.master_port,
            rank_offset=1 + index * self.ranks_per_server,
            world_size=self.world_size,
            group_name=self.name,
            backend=self.backend,
            pp_rank=self.pp_rank,
            options=self.options,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """What the servers are to load, and the version it makes. Use the class methods.

    Args:
        kind: ``disk``, ``distributed``, ``lora`` or ``label``.
        version: The version after it, an integer that the servers carry as their label.
        path: For ``disk`` and ``lora``: the directory as the *servers* see it.
        pause: How requests in flight are held meanwhile: ``keep`` freezes them and lets them go
            on with the new weights, ``abort`` returns them and the engine sends them again,
            ``wait`` lets them finish first. ``retract`` is SGLang's word for ``keep``.
        rolling: One server after the other, so that the rest keep generating; tokens of both
            versions are made meanwhile. False: all at once, which takes less time in all.
        name: For ``lora``: the adapter's name, without a version.
        group: For ``distributed``: who receives.
        chunks: For ``distributed``: what is sent, in the order it is sent.
        send: For ``distributed``: sends a chunk.
        adapter: For ``distributed``: the tensors are of this adapter, and not of the base model.

    Raises:
        UsageError: A value is of another type or out of its range.
    """

    kind: Literal["disk", "distributed", "lora", "label"]
    version: int
    path: str = ""
    pause: PauseMode = "keep"
    rolling: bool = False
    name: str = ""
    group: WeightsGroup | None = None
    chunks: tuple[Chunk, ...] = ()
    send: Send | None = None
    adapter: AdapterSpec | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS, error=UsageError)
        object.__setattr__(self, "version", _version(self.version))
        for name in ("path", "name"):
            text(f"the {name} of a weight update", getattr(self, name), error=UsageError)
        one_of("pause", self.pause, PAUSE_MODES, error=UsageError)
        flag("rolling", self.rolling, error=UsageError)
        if self.group is not None and not isinstance(self.group, WeightsGroup):
            raise UsageError(f"group must be a WeightsGroup, not {shown(self.group)}")
        if self.adapter is not None and not isinstance(self.adapter, AdapterSpec):
            raise UsageError(f"adapter must be an AdapterSpec, not {shown(self.adapter)}")
        object.__setattr__(
            self, "chunks", items("chunks", self.chunks, "TensorSpec", error=UsageError)
        )
        if self.send is not None and not callable(self.send):
            raise UsageError(f"send must be a function, not {shown(self.send)}")

    @classmethod
    def from_disk(
        cls,
        path: str | os.PathLike[str],
        version: int,
        *,
        pause: PauseMode = "keep",
        rolling: bool = False,
    ) -> Self:
        """Weights in a directory that every server can read.

        Args:
            path: The checkpoint's directory, as the servers see it.
            version: The version after the update.
            pause: How requests in flight are held; see the class.
            rolling: One server after the other; see the class.

        Raises:
            UsageError: For a negative version or an empty path.
        """
        where = _path(path)
        if not where:
            raise UsageError("a weight update from disk needs a path")
        return cls(
            kind="disk",
            path=where,
            version=version,
            pause=pause,
            rolling=rolling,
        )

    @classmethod
    def distributed(
        cls,
        version: int,
        *,
        group: WeightsGroup,
        tensors: Iterable[TensorSpec],
        send: Callable[[Chunk], object],
        chunk_size_bytes: int = CHUNK_SIZE_BYTES,
        pause: PauseMode = "keep",
        adapter: AdapterSpec | None = None,
    ) -> Self:
        """Weights that the trainer broadcasts over a network of its own (NCCL).

        The tensors go in chunks. For each, every server is told what to receive, and ``send`` is
        called at the same time: it broadcasts these tensors in this order from rank 0, and returns
        when it is done. Servers and trainer wait for each other inside the broadcast.

        A broadcast needs every rank. A server that answers that it failed takes part in the chunks
        that follow, so that the others get theirs, and is named. When one does not answer at all,
        no further chunk can reach anybody: unless it was the last, the update fails as a whole.
        Either takes no longer than ``update_timeout_s`` a chunk; what hangs inside ``send`` only
        the network's own time-out can end, so set that lower. Nobody can repeat such an update: a
        server that missed it returns with the next.

        Args:
            version: The version after the update.
            group: As ``init_weights_group`` returned it.
            tensors: What is sent.
            send: Sends one chunk. In trio an async function (put a call that blocks into
                ``trio.to_thread.run_sync``); for ``RolloutController`` an ordinary function, called
                in the thread that called ``update_weights``.
            chunk_size_bytes: Tensors sent together, at most; a larger tensor goes alone. It is
                memory that every server needs besides its weights.
            pause: How requests in flight are held; see the class.
            adapter: The tensors are those of this adapter; requests name it from then on, as after
                ``lora``. Only vLLM that AReaL started (``backend="vllm_areal"``) receives one.

        Raises:
            UsageError: For a negative version, no tensors, a type of unknown size, a ``send`` that
                can not be called, a group that nobody joined, or an adapter in several chunks.
        """
        if not isinstance(group, WeightsGroup) or not group.members:
            raise UsageError("nobody is in that group; use what init_weights_group returns")
        if not callable(send):
            raise UsageError("send must be a function that sends a chunk")
        size = integer("chunk_size_bytes", chunk_size_bytes, 1, error=UsageError)
        specs = items("tensors", tensors, "TensorSpec", error=UsageError)
        chunks = tuple(_chunked(specs, size))
        if not chunks:
            raise UsageError("a distributed weight update needs tensors")
        if adapter is not None and not isinstance(adapter, AdapterSpec):
            raise UsageError(f"adapter must be an AdapterSpec, not {shown(adapter)}")
        if adapter is not None and len(chunks) > 1:
            raise UsageError("an adapter is sent whole; raise chunk_size_bytes above its size")
        return cls(
            kind="distributed",
            version=version,
            group=group,
            chunks=chunks,
            send=send,  # type: ignore[arg-type]  # the controller makes an ordinary one async
            pause=pause,
            name=adapter.name if adapter else "",
            adapter=adapter,
        )

    @property
    def has_base(self) -> bool:
        """Whether it changes the base weights, and not an adapter alone."""
        return self.kind != "lora" and self.adapter is None

    @classmethod
    def lora(cls, name: str, path: str | os.PathLike[str], version: int) -> Self:
        """An adapter in a directory that every server can read, while generation goes on.

        It is loaded on every server as ``<name>-v<version>``. When all have answered, requests with
        ``GenerationHyperparameters(lora_name=name)`` name the new one, from one instant on and on
        every server; those under way finish with theirs, which is unloaded when no request uses it.
        Nothing is paused, and caches need no reset: the servers key them by adapter.

        Args:
            name: The adapter's name, without a version.
            path: Its directory, as the servers see it.
            version: The version after the update.

        Raises:
            UsageError: For a negative version, an empty name or path.
        """
        where = _path(path)
        if not text("the name of an adapter", name, error=UsageError) or not where:
            raise UsageError("an adapter needs a name and a path")
        return cls(kind="lora", name=name, path=where, version=version)

    @classmethod
    def label(cls, version: int) -> Self:
        """No weights, only the label: the trainer moved them itself, or withholds them.

        It says that the trainer moved the weights on every server in service. One that is out of
        service, and missed an update or was frozen, is named in ``failed`` and stays out: a label
        would give the wrong name to what it has.

        Args:
            version: The version after the update.

        Raises:
            UsageError: For a negative version.
        """
        return cls(kind="label", version=version)


def _version(version: object) -> int:
    """A version is an int32 beside every token, and text on every server."""
    return integer("a weight version", version, 0, INT32_MAX, error=UsageError)


def _path(path: object) -> str:
    """A path goes to the servers in JSON, so one whose bytes are no UTF-8 can not be named."""
    return text(
        "a path", os.fspath(path) if isinstance(path, os.PathLike) else path, error=UsageError
    )


def _chunked(tensors: Iterable[object], size_bytes_max: int) -> Iterator[Chunk]:
    """Take tensors together, in their order, up to a size."""
    chunk: list[TensorSpec] = []
    room = size_bytes_max
    for tensor in tensors:
        if not isinstance(tensor, TensorSpec):
            raise UsageError(f"tensors are described by TensorSpec, not by {shown(tensor)}")
        size_bytes = _size_bytes(tensor)
        if chunk and size_bytes > room:
            yield tuple(chunk)
            chunk, room = [], size_bytes_max
        chunk.append(tensor)
        room -= size_bytes
    if chunk:
        yield tuple(chunk)


def _size_bytes(tensor: TensorSpec) -> int:
    name = text("a tensor's name", tensor.name, error=UsageError)
    dtype = text(f"the type of tensor {shown(name)}", tensor.dtype, error=UsageError)
    sizes = items(f"the shape of tensor {shown(name)}", tensor.shape, "sizes", error=UsageError)
    words = f"{shown(name)} is of {shown(dtype)}, of unknown size: a size"
    shape = [integer(words, size, 0, INT32_MAX, error=UsageError) for size in sizes]
    size_bytes = DTYPE_SIZE_BYTES.get(dtype_name(dtype))
    if size_bytes is None:
        raise UsageError(f"{shown(name)} is of {shown(dtype)}, of unknown size")
    return size_bytes * math.prod(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdateResult:
    """What a weight update did.

    Args:
        version: The version of the pool after it.
        updated: Servers that serve the new weights.
        failed: Servers that do not, by address, with what went wrong. They are out of service.
        seconds: From the pause to the resume.
    """

    version: int
    updated: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
