"""What a server's dialect must be able to say about weights that do not come from its own disk.

Three things: weights that a trainer broadcasts over a network of its own, adapters, and the memory
that a server lets go of while the trainer uses the GPU. As in ``dialect``: requests built, answers
read, nothing sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..types import HttpRequest, HttpResponse


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is about to be sent: what the receiver has to make room for.

    Args:
        name: The parameter's name in the checkpoint.
        dtype: torch's name of its type, ``bfloat16`` (or ``torch.bfloat16``, as ``str`` gives it).
        shape: Its sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What a server has to know of a LoRA adapter that is sent to it.

    Args:
        name: Without a version; a server is told ``<name>-v<version>``.
        rank: Of its matrices.
        alpha: Its scale, times ``rank``.
        target_modules: The modules it is of.
        bias: peft's: ``none``, ``all`` or ``lora_only``.
        number: The server's own number for it, at least 1.
        base_model: The base model's name.
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    bias: str = "none"
    number: int = 1
    base_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlace:
    """Where one server stands in the trainer's process group.

    Args:
        master_address: Host where the group meets.
        master_port: Its port.
        rank_offset: Rank of the server's first process; the trainer is rank 0.
        world_size: Processes in the whole group, the trainer's too.
        group_name: Of the group, on the servers.
        backend: Of the network, ``nccl``.
        pp_rank: The pipeline stage that the group is of; None where one group holds all stages.
        options: Further fields, such as vLLM's ``packed``, on which both sides must agree.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    backend: str = "nccl"
    pp_rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class WeightRequests(Protocol):
    """The operations of one kind of server. A request is answered as ``parse_control`` reads."""

    receives_adapters: bool
    """Whether an adapter can be sent to a server, and not only loaded from its disk."""
    has_labels: bool
    """Whether a server carries a label of its weights."""
    optional_routes: frozenset[str]
    """Routes that an older server lacks, and does without."""
    memory_tags: tuple[str, ...]
    """What ``sleep`` lets go of, and the order to wake it in; ``weights`` first."""
    weights_survive_sleep: bool
    """Whether a server that sleeps always keeps its weights somewhere, if it is asked to."""
    wakes_twice: bool
    """Whether a server that is awake may be told to wake; another dies of it."""

    def init_group(self, place: GroupPlace) -> HttpRequest:
        """Join the trainer's process group. Answered when the whole group has met."""

    def begin_update(self) -> HttpRequest | None:
        """Make ready for tensors; None where that is not asked for."""

    def receive(
        self,
        tensors: Sequence[TensorSpec],
        group_name: str,
        *,
        last: bool,
        adapter: AdapterSpec | None = None,
    ) -> Sequence[HttpRequest]:
        """Receive tensors from the group, in this order. Answered when they are in their place.

        Those of an adapter are sent at once, under a name that is versioned already, and only to
        servers of a dialect that ``receives_adapters``.
        """

    def end_update(self, version: int) -> Sequence[HttpRequest]:
        """The requests after the last tensor: drop the prefix cache, set the label, go on.

        The label comes last: a server that carries it has everything before it.
        """

    def reopen_update(self) -> HttpRequest | None:
        """Close what an update that failed left open, so that another may begin; None: nothing."""

    def load_adapter(self, name: str, path: str) -> HttpRequest:
        """Take an adapter from disk under a name.

        Where ``has_adapter`` says so of the answer, the server keeps what it has of that name.
        """

    def has_adapter(self, response: HttpResponse) -> bool:
        """Whether a load was refused because an adapter of that name is there, from wherever."""

    def unload_adapter(self, name: str) -> HttpRequest:
        """Forget an adapter."""

    def sleep(self, tags: Sequence[str], *, keep_weights: bool) -> HttpRequest | None:
        """Let go of these of the ``memory_tags``, and keep asleep all others.

        Asked of a server that runs nothing. None where it can not let go of these alone.
        """

    def wake(self, tag: str) -> HttpRequest:
        """Take one of ``memory_tags`` back, in their order."""


def dtype_name(dtype: str) -> str:
    """The bare name, as both servers look it up in torch."""
    return dtype.removeprefix("torch.")
