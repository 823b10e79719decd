"""What rollouts give the trainer: accepted groups, results, and batches of groups as arrays.

The rows themselves are built in ``rows``, and its names are public here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ._core import collate
from ._core.records import Filler
from .checks import integer, one_of
from .errors import UsageError, WorkflowError
from .rows import RowBuilder, check_extra_names, rows_from_result, trajectory_from_response
from .to_torch import to_torch
from .types import (
    INT32_MAX,
    PROMPT_VERSION,
    Failure,
    Float32Array,
    Int32Array,
    Outcome,
    Trajectory,
)

__all__ = [
    "Batch",
    "CollateBuffers",
    "Group",
    "RolloutResult",
    "RowBuilder",
    "rows_from_result",
    "trajectory_from_response",
]

# name -> dtype, and the vector of each row
Columns: TypeAlias = dict[str, tuple[npt.DTypeLike, list[npt.NDArray[Any]]]]

COLUMNS: tuple[tuple[str, npt.DTypeLike], ...] = (
    ("input_ids", np.int32),
    ("loss_mask", np.int32),
    ("logprobs", np.float32),
    ("versions", np.int32),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The accepted rollouts of one prompt: what batches, permits and staleness count.

    Args:
        number: Its permit's number, in the order granted.
        permit_version: The version its permit was granted in; no token of it is older.
        prompt_id: Of the prompt in its data loader.
        task_id: Of the submission.
        members: The rows of each member, in the members' order. A member may have several rows, or
            none where it was rejected alone; the group has at least one.
        member_failures: What members failed of that the group's policy went on without or ran
            again, in the order they did.
    """

    number: int
    permit_version: int
    prompt_id: str
    task_id: str
    members: tuple[tuple[Trajectory, ...], ...]
    member_failures: tuple[Failure, ...] = ()
    _span: tuple[int, int] | None = field(init=False, repr=False)  # of its generated tokens

    def __init__(
        self,
        *,
        number: int,
        permit_version: int,
        prompt_id: str,
        task_id: str,
        members: tuple[tuple[Trajectory, ...], ...],
        member_failures: tuple[Failure, ...] = (),
    ) -> None:
        vars(self).update(  # a frozen class lets no field be assigned
            number=number,
            permit_version=permit_version,
            prompt_id=prompt_id,
            task_id=task_id,
            members=members,
            member_failures=member_failures,
        )
        self.__post_init__()

    def __post_init__(self) -> None:
        if not any(self.members):
            raise UsageError(
                "an accepted group has at least one row; settle it as rejected instead"
            )
        versions = [row.versions for rows in self.members for row in rows]
        vars(self)["_span"] = collate.span(versions)

    @classmethod
    def of(
        cls,
        members: Sequence[Sequence[Trajectory]],
        *,
        number: int,
        permit_version: int,
        prompt_id: str,
        task_id: str,
        member_failures: tuple[Failure, ...] = (),
    ) -> Self:
        """Return a group whose rows carry its ``prompt_id`` and their ``member_index``.

        Args:
            members: The rows of each member, as ``rows_from_result`` returns them.
            number: As in the class.
            permit_version: As in the class.
            prompt_id: As in the class.
            task_id: As in the class.
            member_failures: As in the class.

        Raises:
            UsageError: If no member has a row.
        """
        stamped: list[tuple[Trajectory, ...]] = []
        for index, rows in enumerate(members):
            if len(rows) == 1:  # nearly always
                stamped.append((rows[0].of_member(prompt_id, index),))
            else:
                stamped.append(tuple([row.of_member(prompt_id, index) for row in rows]))
        return cls(
            number=number,
            permit_version=permit_version,
            prompt_id=prompt_id,
            task_id=task_id,
            members=tuple(stamped),
            member_failures=member_failures,
        )

    def __len__(self) -> int:
        """The members."""
        return len(self.members)

    @cached_property
    def rows(self) -> tuple[Trajectory, ...]:
        """All rows, member after member."""
        return tuple(chain.from_iterable(self.members))

    @cached_property
    def rewards(self) -> Float32Array:
        """float32[rows]."""
        return np.array([row.reward for row in self.rows], dtype=np.float32)

    @property
    def head_version(self) -> int | None:
        """The version of the oldest generated token of all members; None where there is none."""
        return None if self._span is None else self._span[0]

    @property
    def tail_version(self) -> int | None:
        """The version of the newest generated token of all members; None where there is none."""
        return None if self._span is None else self._span[1]


class CollateBuffers:
    """A ring of memory for batches: each ``padded`` or ``packed`` call uses the oldest place.

    Fresh pages cost more than the copy into them, so a training loop keeps one ring and passes it
    to every call. Arrays made through a ring are overwritten in place by the ``size``-th call after
    the one that made them; until then they stay as they are. A call that raises uses up no place. A
    place grows with the largest batch it has held, by at most a quarter more than that, and never
    shrinks. Not for use from two threads at once.

    Args:
        size: Places in the ring, at least 1. The default 2 keeps a batch valid while the next one
            is assembled; take one more for each further batch that is held (pipelined steps, an
            asynchronous copy to a GPU).
    """

    def __init__(self, size: int = 2) -> None:
        places = range(integer("a ring of buffers' size", size, 1))
        self._places: list[dict[str, npt.NDArray[Any]]] = [{} for _ in places]
        self._next = 0

    @property
    def size(self) -> int:
        """Places in the ring."""
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """The memory held."""
        return sum(array.nbytes for place in self._places for array in place.values())

    def _take(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of the oldest place, with any content."""
        place = self._places[self._next]
        needed = int(np.prod(shape))
        held = place.get(name)
        if held is None or held.size < needed or held.dtype != dtype:
            spare = 0 if held is None else needed // 4  # a run whose batches grow settles soon
            held = place[name] = np.empty(needed + spare, dtype=dtype)
        return held[:needed].reshape(shape)

    def _turn(self) -> None:
        """What was taken is in use now: the next call takes the next place."""
        self._next = (self._next + 1) % len(self._places)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutResult:
    """What became of one submitted group. Every submission has exactly one.

    Args:
        task_id: As returned by ``submit``.
        prompt_id: Of the prompt in its data loader.
        outcome: How it ended.
        group: Its trajectories, where it was accepted.
        failure: Why, where it failed or expired.
        member_failures: Of members, in the order they happened; an accepted group may have some,
            where its policy went on without them or ran them again.
        number: Its permit's number; None where it never had one (evaluation, or cancelled before).
    """

    task_id: str
    prompt_id: str
    outcome: Outcome
    group: Group | None = None
    failure: Failure | None = None
    member_failures: tuple[Failure, ...] = ()
    number: int | None = None

    def __init__(
        self,
        *,
        task_id: str,
        prompt_id: str,
        outcome: Outcome,
        group: Group | None = None,
        failure: Failure | None = None,
        member_failures: tuple[Failure, ...] = (),
        number: int | None = None,
    ) -> None:
        _fill_result(self, (task_id, prompt_id, outcome, group, failure, member_failures, number))


_fill_result = Filler(RolloutResult, [field.name for field in fields(RolloutResult)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Exactly what one training step consumes: whole groups, in order.

    Args:
        groups: The accepted groups. Read their arrays and write into copies, as ``padded`` and
            ``packed`` return: a ledger has these arrays on the disk only ``ledger_flush_s`` later,
            and a restart would deliver what was written into them meanwhile.
        version: The consuming version: the trainer's weights before this step.
        failures: The results of what settled otherwise since the batch before; the newest, where
            they are very many.
        failures_omitted: How many older ones ``failures`` does not hold.
        number: Of this batch in the ledger, from 0; None where none is kept.
    """

    groups: tuple[Group, ...]
    version: int
    failures: tuple[RolloutResult, ...] = ()
    failures_omitted: int = 0
    number: int | None = None

    def __len__(self) -> int:
        """The groups."""
        return len(self.groups)

    @cached_property
    def rows(self) -> tuple[Trajectory, ...]:
        """All trajectories, group after group, member after member: the order of every array."""
        return tuple(chain.from_iterable(group.rows for group in self.groups))

    def padded(
        self, pad_id: int = 0, *, buffers: CollateBuffers | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the rows as rectangles, padded on the right, under AReaL's names.

        Args:
            pad_id: Fills ``input_ids``; the tokenizer's pad id. The rest is filled with 0, the
                versions with -1.
            buffers: Memory to use again; see its class for how long the arrays stay valid. None:
                fresh arrays, which are the caller's.

        Returns:
            ``input_ids``, ``loss_mask`` and ``versions`` int32[B, T], ``logprobs`` float32[B, T],
            ``attention_mask`` bool[B, T], ``rewards`` float32[B], ``group_ids`` int32[B] (the
            group's place in this batch), and the rows' extras [B, T], or [B, T, width] of matrices.
            B counts rows, T is the longest.

        Raises:
            WorkflowError: If the rows' extras differ in names, dtypes or widths.
        """
        columns, wide = _parted(self._columns())
        shape = (len(self.rows), _longest(columns))
        memory = CollateBuffers(1) if buffers is None else buffers
        out = {name: memory._take(name, shape, dtype) for name, (dtype, _) in columns.items()}
        mask = memory._take("attention_mask", shape, np.bool_)
        fills = {"input_ids": pad_id, "versions": PROMPT_VERSION}
        collate.pad(
            [column for _, column in columns.values()],
            [fills.get(name, 0) for name in columns],
            list(out.values()),
            mask,
        )
        for name, (dtype, rows) in wide.items():
            out[name] = memory._take(name, (*shape, rows[0].shape[1]), dtype)
            _pad_wide(rows, out[name])
        memory._turn()
        return {**out, "attention_mask": mask, **self._per_row()}

    def packed(self, *, buffers: CollateBuffers | None = None) -> dict[str, Any]:
        """Return the rows end to end, without padding: what variable-length attention takes.

        Args:
            buffers: As in ``padded``.

        Returns:
            ``input_ids``, ``loss_mask``, ``versions`` int32[total], ``logprobs`` float32[total],
            the rows' extras [total], or [total, width] of matrices, ``cu_seqlens`` int32[B + 1]
            (row b is ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``), ``max_seqlen`` int, ``rewards``
            float32[B] and ``group_ids`` int32[B].

        Raises:
            WorkflowError: If the rows' extras differ in names, dtypes or widths.
            UsageError: If it has more than 2³¹ - 1 tokens, which ``cu_seqlens`` can not count.
        """
        columns, wide = _parted(self._columns())
        total = sum(map(len, columns["input_ids"][1]))
        if total > INT32_MAX:
            raise UsageError(f"{total} tokens can not be packed: cu_seqlens is int32")
        memory = CollateBuffers(1) if buffers is None else buffers
        out = {name: memory._take(name, (total,), dtype) for name, (dtype, _) in columns.items()}
        cu_seqlens = memory._take("cu_seqlens", (len(self.rows) + 1,), np.int32)
        collate.pack([column for _, column in columns.values()], list(out.values()), cu_seqlens)
        for name, (dtype, rows) in wide.items():
            out[name] = memory._take(name, (total, rows[0].shape[1]), dtype)
            np.concatenate(rows, out=out[name])
        memory._turn()
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": _longest(columns)}
        return {**out, **lengths, **self._per_row()}

    def to_torch(
        self,
        pad_id: int = 0,
        *,
        layout: Literal["padded", "packed"] = "padded",
        buffers: CollateBuffers | None = None,
    ) -> dict[str, Any]:
        """Return ``padded`` or ``packed`` as CPU tensors over the same memory.

        Args:
            pad_id: As in ``padded``; unused where ``layout`` is packed.
            layout: Which of the two.
            buffers: As in ``padded``.

        Raises:
            UsageError: If torch is not installed, or the layout is neither.
            WorkflowError: If the rows' extras differ in names, dtypes or widths.
        """
        one_of("layout", layout, ("padded", "packed"), error=UsageError)
        if layout == "packed":
            return to_torch(self.packed(buffers=buffers))
        return to_torch(self.padded(pad_id, buffers=buffers))

    def staleness(self) -> Int32Array:
        """int32[B]: the consuming version less the row's oldest token's; 0 where it has none."""
        return np.array([self._age(row.head_version) for row in self.rows], dtype=np.int32)

    def staleness_histogram(
        self, of: Literal["tokens", "trajectories"] = "tokens"
    ) -> dict[int, int]:
        """Return how many there are of each staleness, youngest first.

        Args:
            of: ``tokens`` counts each generated token by its own version; ``trajectories`` counts
                each row by ``staleness()``.

        Raises:
            UsageError: For another word.
        """
        one_of("of", of, ("tokens", "trajectories"), error=UsageError)
        ages, counts = np.unique(
            self._token_ages() if of == "tokens" else self.staleness(), return_counts=True
        )
        return dict(zip(ages.tolist(), counts.tolist(), strict=True))

    def mixed_version_trajectories(self) -> int:
        """Return how many rows were made by more than one version."""
        return sum(row.head_version != row.tail_version for row in self.rows)

    def _age(self, version: int | None) -> int:
        return 0 if version is None else self.version - version

    def _token_ages(self) -> Int32Array:
        if not self.rows:
            return np.empty(0, dtype=np.int32)
        versions = np.concatenate([row.versions for row in self.rows])
        return np.asarray(self.version - versions[versions >= 0], dtype=np.int32)

    def _per_row(self) -> dict[str, npt.NDArray[Any]]:
        """Small, so always fresh."""
        sizes = [len(group.rows) for group in self.groups]
        return {
            "rewards": np.array([row.reward for row in self.rows], dtype=np.float32),
            "group_ids": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        }

    def _columns(self) -> Columns:
        """Name to dtype and the rows' vectors; the first row says which extras there are."""
        columns: Columns = {
            name: (dtype, list(map(attrgetter(name), self.rows))) for name, dtype in COLUMNS
        }
        if not any(row.extras for row in self.rows):
            return columns
        kinds = _extra_kinds(self.rows[0].extras)
        check_extra_names(kinds)
        for row in self.rows:
            if _extra_kinds(row.extras) != kinds:
                raise WorkflowError(
                    f"the rows of a batch must have the same extras: some have "
                    f"{sorted(kinds)}, some {sorted(row.extras)}, or in other dtypes or widths"
                )
        extras = {name: [row.extras[name] for row in self.rows] for name in kinds}
        return {**columns, **{name: (kinds[name][0], extras[name]) for name in kinds}}


def _longest(columns: Columns) -> int:
    return max(map(len, columns["input_ids"][1]), default=0)


def _extra_kinds(extras: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Name to dtype and width; a vector has none."""
    return {name: (extra.dtype, extra.shape[1:]) for name, extra in extras.items()}


def _parted(columns: Columns) -> tuple[Columns, Columns]:
    """The vectors, and the matrices."""
    wide = {name: column for name, column in columns.items() if column[1] and column[1][0].ndim > 1}
    return {name: column for name, column in columns.items() if name not in wide}, wide


def _pad_wide(rows: list[npt.NDArray[Any]], out: npt.NDArray[Any]) -> None:
    """Matrices are few and large, so that what a loop costs does not matter."""
    for row, place in zip(rows, out, strict=True):
        place[: len(row)] = row
        place[len(row) :] = 0
