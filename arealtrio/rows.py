"""Build the rows a trainer learns from: out of responses, or out of whatever a workflow returned.

Below ``workflow`` and ``trajectory``, which both need it and do not import each other.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ._core import vectors
from .checks import shown
from .errors import InvalidRequest, WorkflowError
from .types import (
    FLOAT32_MAX,
    INT32_MAX,
    PROMPT_VERSION,
    Float32Array,
    Int32Array,
    IntegerArray,
    ModelResponse,
    TokenIds,
    Trajectory,
    as_token_ids,
    vector_of,
)

# What ``arun_episode`` may return; ``rows_from_result`` reads it.
WorkflowResult: TypeAlias = Trajectory | Sequence[Trajectory] | Mapping[str, Any] | None

AREAL_KEYS = ("input_ids", "loss_mask", "logprobs", "versions", "attention_mask", "rewards")
INTEGER_KEYS = ("input_ids", "loss_mask", "versions", "attention_mask")

# What a batch's dicts already use; an extra of such a name would overwrite a column.
RESERVED_NAMES = frozenset((*AREAL_KEYS, "group_ids", "cu_seqlens", "max_seqlen"))

EXPECTED = (
    "a workflow returns a Trajectory, a non-empty sequence of them, a dict of [batch, seq] arrays "
    f"({', '.join(AREAL_KEYS)}; rewards is [batch]), or None to reject the rollout"
)


def as_reward(value: object) -> float:
    """Return a reward as a float; a wrong one is the workflow's error, never a silent 0.

    Args:
        value: A real number that is finite as a float32, a bool, or an array or tensor of no
            dimension holding one.

    Raises:
        WorkflowError: For anything else, infinities and NaN included.
    """
    reward = value if type(value) is float else _as_float(value)
    if not abs(reward) <= FLOAT32_MAX:
        raise WorkflowError(f"a reward must be finite as a float32, not {reward:g}")
    return reward


def _as_float(value: object) -> float:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise WorkflowError(f"a reward must be a number, not a {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:  # an int or a fraction beyond even that
        return inf


def as_column(name: str, value: object) -> npt.NDArray[Any]:
    """Return numbers as a C-contiguous int32 or float32 array, the two dtypes a batch holds.

    Args:
        name: For the error.
        value: Booleans, integers within int32, or floats; an array, a CPU tensor or nested lists.

    Raises:
        WorkflowError: For another dtype, ragged lists, or an integer outside int32.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as exc:  # all three are torch's ways to refuse
        raise WorkflowError(
            f"{name} is not an array of numbers; a tensor must be on the CPU, detached, and of a "
            "dtype that numpy has"
        ) from exc
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind not in "biu":
        raise WorkflowError(f"{name} must hold integers or floats, not {array.dtype}")
    if array.size and (int(array.min()) < -INT32_MAX - 1 or int(array.max()) > INT32_MAX):
        raise WorkflowError(f"{name} holds an integer outside int32")
    return np.ascontiguousarray(array, dtype=np.int32)


class RowBuilder:
    """One row in the making: prompts and answers appended in the order the model saw them.

    Token-in-token-out: what the model read and wrote goes into the row as it was, and is never
    decoded and encoded again, which can give other tokens than those whose logprobs are known.
    An error leaves the row as it was.
    """

    def __init__(self) -> None:
        # Ids in the order of the row, with the logprobs and versions of what a model made.
        self._parts: list[tuple[Int32Array, Float32Array | None, Int32Array | None]] = []
        self._experts: list[IntegerArray] = []  # of the first tokens, as far as they were told
        self._length = 0
        self._exact = True

    def __len__(self) -> int:
        """The tokens so far."""
        return self._length

    @property
    def input_ids(self) -> Int32Array:
        """int32[T], the tokens so far: what the next request's ``input_ids`` must be."""
        if not self._parts:
            return np.empty(0, dtype=np.int32)
        return np.concatenate([ids for ids, _, _ in self._parts])

    def append_prompt(self, token_ids: TokenIds) -> Self:
        """Append tokens that no model made: masked 0, logprob 0, version -1.

        Args:
            token_ids: int32[P]; a prompt, a user's turn, a tool's answer. Copied.

        Raises:
            InvalidRequest: If they are no token ids.
        """
        self._append(as_token_ids(token_ids, "prompt tokens").copy(), None, None)
        return self

    def append_response(self, response: ModelResponse) -> Self:
        """Append the tokens a model made: masked 1, with their logprobs and versions.

        Args:
            response: Its prompt must be exactly the tokens so far. On an empty row its prompt is
                appended first.

        Raises:
            WorkflowError: If the model read another prompt than the row holds, or the response's
                vectors differ in length.
        """
        self._check(response)
        if not self._length:
            self.append_prompt(response.input_tokens)
        self._append(response.output_tokens, response.output_logprobs, response.output_versions)
        self._exact = self._exact and response.versions_exact
        self._append_experts(response.routed_experts)
        return self

    def _append_experts(self, told: IntegerArray | None) -> None:
        """Take those of the tokens that no earlier answer told: they were read by this one."""
        if told is None:
            self._experts = []
            return
        self._experts.append(told[sum(map(len, self._experts)) :])

    def build(
        self, reward: float, *, extras: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> Trajectory:
        """Return the row; the builder may go on and build a longer one.

        Args:
            reward: Of the whole row, finite.
            extras: Further vectors of the row's length, int32 or float32 after conversion, or
                matrices with a row for each token. Where the last response tells the experts that
                its tokens went through, these are the extra ``routed_experts``, int[T, layers ·
                top_k]; zeros stand for what no model has read, as the last token.

        Raises:
            WorkflowError: For a reward that is no finite number, an empty row or a wrong extra.
        """
        if not self._length:
            raise WorkflowError("a row needs at least one token: append a prompt or a response")
        value = as_reward(reward)
        columns = vectors.columns(self._parts)
        plain = not self._experts and not extras and type(self._exact) is bool
        if columns is not None and plain:  # nearly always
            return Trajectory.of_columns(columns, value, self._exact)
        input_ids, loss_mask, logprobs, versions = columns or self._unusual_columns()
        row = Trajectory(
            input_ids=input_ids,
            loss_mask=loss_mask,
            logprobs=logprobs,
            versions=versions,
            reward=value,
            versions_exact=self._exact,
            extras={**self._experts_extra(), **(extras or {})},
        )
        return _with_clean_extras(row)

    def _unusual_columns(self) -> tuple[Int32Array, Int32Array, Float32Array, Int32Array]:
        loss_mask = np.zeros(self._length, dtype=np.int32)
        logprobs = np.zeros(self._length, dtype=np.float32)
        versions = vector_of(PROMPT_VERSION, self._length)
        end = 0
        for ids, made_logprobs, made_versions in self._parts:
            start, end = end, end + len(ids)
            if made_logprobs is not None and made_versions is not None:
                loss_mask[start:end] = 1
                logprobs[start:end] = made_logprobs
                versions[start:end] = made_versions
        return self.input_ids, loss_mask, logprobs, versions

    def _experts_extra(self) -> dict[str, IntegerArray]:
        if not self._experts:
            return {}
        told = np.concatenate(self._experts)
        whole = np.zeros((self._length, told.shape[1]), dtype=told.dtype)
        whole[: len(told)] = told
        return {"routed_experts": whole}

    def _check(self, response: ModelResponse) -> None:
        length = len(response.output_tokens)
        if length != len(response.output_logprobs) or length != len(response.output_versions):
            raise WorkflowError("the response's tokens, logprobs and versions differ in length")
        if self._length and not np.array_equal(response.input_tokens, self.input_ids):
            raise WorkflowError(
                f"the response answers a prompt of {response.input_len} tokens that is not this "
                f"row's {self._length}: send the builder's input_ids as the request's"
            )

    def _append(
        self, ids: Int32Array, logprobs: Float32Array | None, versions: Int32Array | None
    ) -> None:
        self._parts.append((ids, logprobs, versions))
        self._length += len(ids)


def trajectory_from_response(
    response: ModelResponse,
    reward: float,
    *,
    extras: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Trajectory:
    """Return one generation as a row: the prompt masked out, the answer to be learnt from.

    Args:
        response: Of ``engine.agenerate``.
        reward: Of the whole row, finite.
        extras: Further vectors of length P + N, int32 or float32 after conversion.

    Returns:
        A row of T = P + N tokens. On the P prompt tokens ``loss_mask`` is 0, ``logprobs`` 0.0 and
        ``versions`` -1, as in AReaL.

    Raises:
        WorkflowError: For a reward that is no finite number, or a wrong extra.
    """
    return RowBuilder().append_response(response).build(reward, extras=extras)


def rows_from_result(result: object) -> tuple[Trajectory, ...]:
    """Return the rows of whatever a workflow may return.

    Args:
        result: None, a Trajectory, a non-empty sequence of them, or AReaL's dict: ``input_ids``,
            ``loss_mask``, ``logprobs``, ``versions`` and ``attention_mask`` of one shape
            [batch, seq], ``rewards`` [batch], and any further [batch, seq] numbers as extras. Its
            padding, on either side, is cut away by ``attention_mask``.

    Returns:
        The rows; none where the result is None, which means the rollout is rejected.

    Raises:
        WorkflowError: For anything else. The message says what is expected, and shows no data.
    """
    if result is None:
        return ()
    if isinstance(result, Trajectory):
        return (_with_clean_extras(result),)
    if isinstance(result, Mapping):
        return _rows_from_dict(result)
    if isinstance(result, Sequence) and not isinstance(result, str | bytes | bytearray):
        return _rows_from_sequence(result)
    raise WorkflowError(f"{EXPECTED}; not a {type(result).__name__}")


def _rows_from_sequence(result: Sequence[object]) -> tuple[Trajectory, ...]:
    if not result:
        raise WorkflowError(f"{EXPECTED}; not an empty {type(result).__name__}")
    return tuple(_with_clean_extras(row) for row in result)


def _with_clean_extras(row: object) -> Trajectory:
    """A row whose extras have a batch's dtypes and no name of its columns."""
    if not isinstance(row, Trajectory):
        raise WorkflowError(f"{EXPECTED}; not a sequence with a {type(row).__name__}")
    if not row.extras:
        return row
    check_extra_names(row.extras)
    clean = {name: _clean_extra(name, extra) for name, extra in row.extras.items()}
    if all(clean[name] is row.extras[name] for name in clean):
        return row
    return replace(row, extras=clean)


def _clean_extra(name: str, extra: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A vector in one of a batch's two dtypes; a matrix, which may be large, in its own."""
    if np.ndim(extra) != 2 or np.asarray(extra).dtype.kind not in "iuf":
        return as_column(f"extra {name!r}", extra)
    return np.ascontiguousarray(extra)


def check_extra_names(names: Iterable[str]) -> None:
    """Raise WorkflowError where an extra has the name of one of a batch's own columns, or no name.

    A ledger has to write it, so it is text that UTF-8 can say.
    """
    names = list(names)
    for name in names:
        if not isinstance(name, str) or not _is_unicode(name):
            raise WorkflowError(f"an extra is called by text, not {shown(name)}")
    taken = sorted(RESERVED_NAMES.intersection(names))
    if taken:
        raise WorkflowError(
            f"extras can not be called {', '.join(taken)}: a batch has these itself"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a half of a character that UTF-16 needs two for
        return False
    return True


def _rows_from_dict(result: Mapping[Any, Any]) -> tuple[Trajectory, ...]:
    missing = [key for key in AREAL_KEYS if key not in result]
    if missing:
        raise WorkflowError(f"{EXPECTED}; {', '.join(missing)} missing in the dict")
    columns = {str(key): as_column(str(key), value) for key, value in result.items()}
    rewards = columns.pop("rewards")
    shape = columns["input_ids"].shape
    if len(shape) != 2 or shape[0] == 0:
        raise WorkflowError(f"{EXPECTED}; input_ids has the shape {list(shape)}")
    _check_shapes(columns, rewards, shape)
    mask = columns.pop("attention_mask").astype(bool)
    check_extra_names(key for key in columns if key not in AREAL_KEYS)
    return tuple(_row_of_dict(columns, mask[b], rewards[b], b) for b in range(shape[0]))


def _check_shapes(
    columns: Mapping[str, npt.NDArray[Any]], rewards: npt.NDArray[Any], shape: tuple[int, ...]
) -> None:
    for key, column in columns.items():
        if column.shape != shape:
            raise WorkflowError(
                f"{key} has the shape {list(column.shape)}, but input_ids {list(shape)}"
            )
        if key in INTEGER_KEYS and column.dtype != np.int32:
            raise WorkflowError(f"{key} must hold integers, not {column.dtype}")
    if rewards.shape != shape[:1]:
        raise WorkflowError(
            f"rewards has the shape {list(rewards.shape)}, but there are {shape[0]} rows"
        )


def _row_of_dict(
    columns: Mapping[str, npt.NDArray[Any]], mask: npt.NDArray[np.bool_], reward: object, b: int
) -> Trajectory:
    kept = _kept(mask, b)
    fields = {
        key: column[b, kept].copy() for key, column in columns.items()
    }  # not a view of theirs
    try:
        ids = as_token_ids(fields.pop("input_ids"))
    except InvalidRequest as exc:
        raise WorkflowError(f"row {b}: {exc}") from exc
    return Trajectory(
        input_ids=ids,
        loss_mask=fields.pop("loss_mask"),
        logprobs=fields.pop("logprobs"),
        versions=fields.pop("versions"),
        reward=as_reward(reward),
        extras=fields,
    )


def _kept(mask: npt.NDArray[np.bool_], b: int) -> slice:
    """Where row b is. With its middle cut out, its logprobs would be of another context."""
    seen = np.flatnonzero(mask)
    if not seen.size:
        raise WorkflowError(f"attention_mask shows no token of row {b}")
    kept = slice(int(seen[0]), int(seen[-1]) + 1)
    if kept.stop - kept.start != seen.size:
        raise WorkflowError(f"attention_mask has holes inside row {b}; it may only cut off padding")
    return kept
