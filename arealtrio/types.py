"""The records that travel between the rooms: frozen, typed, with shapes and dtypes stated.

Shapes: ``P`` prompt tokens, ``N`` generated tokens, ``T = P + N`` (more over several turns).
Token ids and versions are int32, logprobs float32, masks int32.

What a user handles is a dataclass. What only rooms hand each other, several for every answer, is a
``msgspec.Struct``: a frozen dataclass takes ten times as long to make. Those of the dataclasses
that every rollout makes have their ``__init__`` written out, to fill all slots in one call: what
``dataclass`` writes takes twice as long.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from ._core import vectors
from ._core.records import Filler
from .checks import finite, flag, integer, items, shown, text
from .errors import ConfigError, InvalidRequest, WorkflowError

Int32Array: TypeAlias = npt.NDArray[np.int32]
Float32Array: TypeAlias = npt.NDArray[np.float32]
IntegerArray: TypeAlias = npt.NDArray[np.integer[Any]]
TokenIds: TypeAlias = Int32Array | Sequence[int]

StopReason: TypeAlias = Literal["stop", "length", "abort", "tool_calls"]
PauseMode: TypeAlias = Literal["keep", "abort", "wait", "retract", "in_place"]

INT32_MAX = 2**31 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
PROMPT_VERSION = -1  # AReaL's mark for a token that no model made


def as_token_ids(value: TokenIds, what: str = "input_ids") -> Int32Array:
    """Return ``value`` as a C-contiguous int32 vector of non-negative ids.

    Args:
        value: A one-dimensional integer array, or a sequence of Python ints.
        what: The argument's name, for the error.

    Raises:
        InvalidRequest: If it is not one-dimensional, not integral, or an id is negative or ≥ 2³¹.
    """
    usual = vectors.token_ids(value)
    if usual is not None:
        return usual
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise InvalidRequest(f"{what} is not a vector of token ids") from exc
    if ids.size == 0 and ids.ndim == 1:
        return np.empty(0, dtype=np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidRequest(
            f"{what} must be a one-dimensional vector of integers, "
            f"not {ids.ndim}-dimensional {ids.dtype}"
        )
    if np.minimum.reduce(ids) < 0 or (ids.dtype != np.int32 and int(ids.max()) > INT32_MAX):
        raise InvalidRequest(f"{what} holds an id outside 0 … {INT32_MAX}")
    return np.ascontiguousarray(ids, dtype=np.int32)


def vector_of(value: int, length: int) -> Int32Array:
    """Return an int32 vector that holds one value only; ``np.full`` takes three times as long."""
    made = np.empty(length, np.int32)
    made.fill(value)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationHyperparameters:
    """How to sample. The names and defaults are AReaL's.

    Args:
        n_samples: Always 1 in a request; ask for several answers with ``group_size``.
        max_new_tokens: Tokens to generate at most, over all segments of one generation.
        min_new_tokens: No stop before that many tokens.
        max_tokens: Prompt and answer together at most.
        greedy: Take the most probable token; ``temperature`` is then sent as 0.
        top_p: Nucleus mass, in (0, 1].
        top_k: Candidates kept; anything ≥ the vocabulary means all of them.
        min_p: Probability floor relative to the best token, in [0, 1).
        temperature: 0 is greedy. At any other than 1 the server's logprobs need care; see
            ``ModelResponse.output_logprobs``.
        stop_token_ids: Generation ends after one of these (kept in the output).
        stop: Generation ends after one of these strings.
        ignore_eos: Go on past the end-of-sequence token.
        skip_special_tokens: For the server's text, which this library does not read.
        return_routed_experts: Of a mixture of experts, tell which of them each token went through,
            so that a trainer can send it through the same ones; see
            ``ModelResponse.routed_experts``. The servers need ``--enable-return-routed-experts``.
        frequency_penalty: In [-2, 2]; 0 is off.
        presence_penalty: In [-2, 2]; 0 is off.
        repetition_penalty: Above 0; 1 is off.
        seed: Of the server's sampler; None leaves it to the server.
        lora_name: Adapter to use; empty is the base model.

    Raises:
        ConfigError: A value is of another type or out of its range; it names the field.
    """

    n_samples: int = 1
    max_new_tokens: int = 16384
    min_new_tokens: int = 0
    max_tokens: int = 32768
    greedy: bool = False
    top_p: float = 1.0
    top_k: int = int(1e8)
    min_p: float = 0.0
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_routed_experts: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    lora_name: str = ""

    def __post_init__(self) -> None:
        for name, least, most in _COUNTS:
            object.__setattr__(self, name, integer(name, getattr(self, name), least, most))
        for name in _NUMBERS:
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        for name in ("greedy", "ignore_eos", "skip_special_tokens", "return_routed_experts"):
            flag(name, getattr(self, name))
        text("lora_name", self.lora_name)
        if self.seed is not None:
            object.__setattr__(self, "seed", integer("seed", self.seed, -(2**63), 2**63 - 1))
        self._check_stops()
        self._check_ranges()

    def _check_stops(self) -> None:
        ids = items("stop_token_ids", self.stop_token_ids, "token ids")
        checked = tuple(integer("each of stop_token_ids", i, 0, INT32_MAX) for i in ids)
        object.__setattr__(self, "stop_token_ids", checked)
        stop: object = self.stop  # a caller may well write stop="…"
        words = (stop,) if isinstance(stop, str) else items("stop", stop, "strings")
        object.__setattr__(self, "stop", tuple(text("each of stop", word) for word in words))

    def _check_ranges(self) -> None:
        self._check(self.min_new_tokens <= self.max_new_tokens,
                    "min_new_tokens must be between 0 and max_new_tokens")  # fmt: skip
        self._check(0 < self.top_p <= 1, "top_p must be in (0, 1]")
        self._check(0 <= self.min_p < 1, "min_p must be in [0, 1)")
        self._check(self.temperature >= 0, "temperature must be finite and not negative")
        for name in ("frequency_penalty", "presence_penalty"):
            self._check(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2]")
        self._check(self.repetition_penalty > 0, "repetition_penalty must be above 0")

    @staticmethod
    def _check(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    def new(self, **changes: Any) -> Self:
        """Return a copy with some fields changed (AReaL's name for it)."""
        return replace(self, **changes)


_COUNTS = (
    ("n_samples", 1, INT32_MAX),
    ("max_new_tokens", 1, INT32_MAX),
    ("min_new_tokens", 0, INT32_MAX),
    ("max_tokens", 1, INT32_MAX),
    ("top_k", 1, 2**63 - 1),
)
_NUMBERS = (
    "top_p", "min_p", "temperature", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelRequest:
    """One generation to run on whatever server is free.

    Args:
        input_ids: int32[P], the prompt's token ids; anything ``as_token_ids`` takes. Of a chat they
            may be left out on vLLM, which tells what tokens it makes of it; SGLang needs them, with
            a placeholder for each image.
        gconfig: How to sample.
        rid: The request's id; each segment's id on a server derives from it. Empty: a fresh one.
        session: Requests that share a prefix (turns of one conversation, members of a group) share
            this key, so that they may find their prefix in one server's cache. None: no preference.
        metadata: Carried along untouched, never sent.
        messages: The prompt as a chat, for a vision model: OpenAI's messages, whose ``image_url``
            parts hold URLs or ``data:`` URLs. Such a generation is asked for in one piece, because
            a server can not go on from the tokens of a chat exactly.
        tokenizer: AReaL's argument, which nothing here needs: accepted, not kept.

    Raises:
        InvalidRequest: An argument is of another type, or ``as_token_ids`` refuses the ids.
    """

    input_ids: Int32Array
    gconfig: GenerationHyperparameters = field(default_factory=GenerationHyperparameters)
    rid: str = ""
    session: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()

    def __init__(
        self,
        input_ids: TokenIds = (),
        gconfig: GenerationHyperparameters | None = None,
        rid: str = "",
        session: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        tokenizer: object = None,  # noqa: ARG002
    ) -> None:
        ids = as_token_ids(input_ids)
        if gconfig is not None and not isinstance(gconfig, GenerationHyperparameters):
            raise InvalidRequest(f"gconfig must be GenerationHyperparameters, not {shown(gconfig)}")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidRequest(f"metadata must be a mapping, not {shown(metadata)}")
        rid = text("rid", rid, error=InvalidRequest)
        if session is not None:
            text("session", session, error=InvalidRequest)
        kept, chat = dict(metadata or {}), _as_messages(messages)
        _fill_request(self, (ids, gconfig or _DEFAULTS, rid, session, kept, chat))


_DEFAULTS = GenerationHyperparameters()
_fill_request = Filler(ModelRequest, [field.name for field in fields(ModelRequest)])


def _as_messages(messages: object) -> tuple[Mapping[str, Any], ...]:
    if isinstance(messages, tuple) and not messages:
        return ()
    if isinstance(messages, Sequence) and not isinstance(messages, str | bytes):
        found = tuple(messages)
        if all(isinstance(message, Mapping) for message in found):
            return found
    raise InvalidRequest("messages must be a sequence of mappings, such as {'role': …}")


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one HTTP answer: ``output_tokens[start:end]`` came from ``server``."""

    server: str
    start: int
    end: int

    def __init__(self, server: str, start: int, end: int) -> None:
        _fill_segment(self, (server, start, end))


_fill_segment = Filler(Segment, [field.name for field in fields(Segment)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelResponse:
    """What one generation gave. The three output vectors have one length N (invariant I8).

    Args:
        rid: The request's id.
        input_tokens: int32[P], as asked; of a chat as the server read it, where it tells that.
        output_tokens: int32[N].
        output_logprobs: float32[N], of each token when it was sampled, as its server means them.
            SGLang: after the temperature, before top-p, top-k and min-p. vLLM by default
            (``raw_logprobs``): the model's own, before the temperature and all else, so at another
            temperature than 1 not of the policy that sampled; with ``--logprobs-mode
            processed_logprobs``: after the temperature and all else. An engine warns, once, at the
            first request whose temperature makes the difference; a vLLM that gives logits instead
            of logprobs is not taken in.
        output_versions: int32[N], the weight version that made each token; never decreasing.
        stop_reason: ``stop`` (EOS, stop id or stop string), ``length``, or ``tool_calls``.
        versions_exact: False where a version had to be taken from the client's own belief although
            an update landed meanwhile, or the server's label was not an integer.
        segments: Where the tokens came from, in order.
        routed_experts: int[P + N - 1, layers · top_k], the experts that each token but the last
            went through on its server, if they were asked for, else None. Nothing has read the last
            token yet. ``reshape(len, layers, -1)`` parts the layers: SGLang does not say how many
            there are. The dtype is what servers send: uint8 or uint16 from vLLM, int32 from SGLang.
        latency_s: From the call to the last token, waiting for a server included.
        wait_s: The part of it spent waiting for a server.
    """

    rid: str
    input_tokens: Int32Array
    output_tokens: Int32Array
    output_logprobs: Float32Array
    output_versions: Int32Array
    stop_reason: StopReason
    versions_exact: bool = True
    segments: tuple[Segment, ...] = ()
    routed_experts: IntegerArray | None = None
    latency_s: float = 0.0
    wait_s: float = 0.0

    def __init__(
        self,
        *,
        rid: str,
        input_tokens: Int32Array,
        output_tokens: Int32Array,
        output_logprobs: Float32Array,
        output_versions: Int32Array,
        stop_reason: StopReason,
        versions_exact: bool = True,
        segments: tuple[Segment, ...] = (),
        routed_experts: IntegerArray | None = None,
        latency_s: float = 0.0,
        wait_s: float = 0.0,
    ) -> None:
        _fill_response(
            self,
            (
                rid, input_tokens, output_tokens, output_logprobs, output_versions, stop_reason,
                versions_exact, segments, routed_experts, latency_s, wait_s,
            ),
        )  # fmt: skip

    @property
    def input_len(self) -> int:
        """P, the number of prompt tokens."""
        return len(self.input_tokens)

    @property
    def output_len(self) -> int:
        """N, the number of generated tokens."""
        return len(self.output_tokens)


_fill_response = Filler(ModelResponse, [field.name for field in fields(ModelResponse)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One row for the trainer: AReaL's trajectory, unpadded.

    Args:
        input_ids: int32[T], prompt and answers.
        loss_mask: int32[T], 1 on tokens to learn from (the model's own), else 0.
        logprobs: float32[T], 0 where no model made the token.
        versions: int32[T], -1 where no model made the token.
        reward: Of the whole row; finite as a float32.
        versions_exact: Whether every version is known rather than believed.
        prompt_id: Of the prompt in its data loader; filled in by the executor.
        member_index: Of this row's rollout in its group; filled in by the executor.
        extras: Further float32 or int32 vectors of length T, or matrices of T rows in a dtype of
            their own (``routed_experts``), collated under their own names. None: there are none.

    Raises:
        WorkflowError: A value is of another type, length or range.
    """

    input_ids: Int32Array
    loss_mask: Int32Array
    logprobs: Float32Array
    versions: Int32Array
    reward: float
    versions_exact: bool = True
    prompt_id: str = ""
    member_index: int = 0
    extras: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __init__(
        self,
        *,
        input_ids: Int32Array,
        loss_mask: Int32Array,
        logprobs: Float32Array,
        versions: Int32Array,
        reward: float,
        versions_exact: bool = True,
        prompt_id: str = "",
        member_index: int = 0,
        extras: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        extras = {} if extras is None else extras
        _fill_trajectory(
            self,
            (
                input_ids, loss_mask, logprobs, versions, reward, versions_exact, prompt_id,
                member_index, extras,
            ),
        )  # fmt: skip
        self.__post_init__()

    def __post_init__(self) -> None:
        columns = (self.input_ids, self.loss_mask, self.logprobs, self.versions)
        if not vectors.are_alike(columns, b"iifi"):
            self._make_alike()
        if type(self.extras) is not dict and not isinstance(self.extras, Mapping):
            raise WorkflowError(
                f"a trajectory's extras must be a mapping, not {shown(self.extras)}"
            )
        for name, extra in self.extras.items():
            shape = _shape(extra)
            if shape is None or shape[:1] != self.input_ids.shape or len(shape) > 2:
                raise WorkflowError(
                    f"a trajectory's extra {shown(name)} must be as long as its input_ids: a "
                    "vector, or a matrix with a row for each"
                )
        if type(self.reward) is not float or not abs(self.reward) <= FLOAT32_MAX:
            self._check_reward()
        flag("a trajectory's versions_exact", self.versions_exact, error=WorkflowError)
        text("a trajectory's prompt_id", self.prompt_id, error=WorkflowError)
        index = integer("a trajectory's member_index", self.member_index, 0, error=WorkflowError)
        if index is not self.member_index:
            object.__setattr__(self, "member_index", index)

    def _check_reward(self) -> None:
        """Turn what a workflow gave into a reward, or say why it is none."""
        reward = finite("a trajectory's reward", self.reward, error=WorkflowError)
        if abs(reward) > FLOAT32_MAX:
            raise WorkflowError("a trajectory's reward must be finite as a float32")
        if reward is not self.reward:
            object.__setattr__(self, "reward", reward)

    def _make_alike(self) -> None:
        """Turn what a workflow gave into the four columns, or say which of them is none."""
        for name, dtype in (("input_ids", np.int32), ("loss_mask", np.int32),
                            ("logprobs", np.float32), ("versions", np.int32)):  # fmt: skip
            given = getattr(self, name)
            array = _vector(name, given, dtype)
            if array.shape != np.shape(self.input_ids) or array.ndim != 1 or array.size == 0:
                raise WorkflowError(
                    f"a trajectory's {name} must be a vector as long as its input_ids, "
                    f"not of shape {array.shape}"
                )
            if array is not given:
                object.__setattr__(self, name, array)

    @classmethod
    def of_columns(
        cls,
        columns: tuple[Int32Array, Int32Array, Float32Array, Int32Array],
        reward: float,
        versions_exact: bool,
    ) -> Trajectory:
        """Return a row of what was made for it and needs no look: see ``RowBuilder.build``.

        Args:
            columns: ``input_ids``, ``loss_mask``, ``logprobs`` and ``versions``, as in the class.
            reward: A float, finite as a float32.
            versions_exact: As in the class.
        """
        row = object.__new__(cls)
        _fill_trajectory(row, (*columns, reward, versions_exact, "", 0, {}))
        return row

    def of_member(self, prompt_id: str, member_index: int) -> Trajectory:
        """Return the same row with its origin filled in. Its arrays are shared and checked."""
        row = object.__new__(Trajectory)  # not replace(): that would check the arrays once more
        _fill_trajectory(
            row,
            (
                self.input_ids, self.loss_mask, self.logprobs, self.versions, self.reward,
                self.versions_exact, prompt_id, member_index, self.extras,
            ),
        )  # fmt: skip
        return row

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def head_version(self) -> int | None:
        """The version of the oldest generated token; None where nothing was generated."""
        made = self.versions[self.versions >= 0]
        return int(made.min()) if made.size else None

    @property
    def tail_version(self) -> int | None:
        """The version of the newest generated token; None where nothing was generated."""
        made = self.versions[self.versions >= 0]
        return int(made.max()) if made.size else None


def _shape(value: Any) -> tuple[int, ...] | None:
    try:
        return np.asarray(value).shape
    except (TypeError, ValueError):  # lists of unequal length
        return None


def _vector(name: str, value: object, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """What a workflow gave as an array of ``dtype``; integers only where nothing is lost."""
    if type(value) is np.ndarray and value.dtype == dtype and value.flags.c_contiguous:
        return value
    refusal = WorkflowError(f"a trajectory's {name} must be a vector of {dtype.__name__}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise refusal from exc
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    if array.size and array.dtype.kind not in "biuf":
        raise refusal
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(array, dtype=dtype)
    if dtype is np.int32 and not np.array_equal(cast, array):
        raise refusal
    return cast


_fill_trajectory = Filler(Trajectory, [field.name for field in fields(Trajectory)])


class Outcome(enum.Enum):
    """How a group settled: exactly one of these, exactly once."""

    __hash__ = object.__hash__  # each is one object; Enum's own is written in Python
    ACCEPTED = "accepted"
    REJECTED = "rejected"  # the workflow returned None, or the filter said no
    FAILED = "failed"  # with its exception, classed by FailureKind
    EXPIRED = "expired"  # its deadline passed
    CANCELLED = "cancelled"  # its owner withdrew it, or the executor closed


class FailureKind(enum.Enum):
    """Whose failure it was."""

    INFRASTRUCTURE = "infrastructure"  # a server or the way to it
    WORKFLOW = "workflow"  # user code raised, or broke its contract
    DATA = "data"  # the prompt can not be generated from (too long, outside the vocabulary)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group failed or expired.

    Args:
        kind: Whose failure it was.
        error: The exception itself, with its traceback.
        member_index: Of the member that failed first; None where the whole group did (its filter).
    """

    kind: FailureKind
    error: Exception
    member_index: int | None = None

    def __str__(self) -> str:
        where = "" if self.member_index is None else f" in member {self.member_index}"
        return f"{self.kind.value} failure{where}: {type(self.error).__name__}: {self.error}"


class HttpRequest(msgspec.Struct, frozen=True):
    """A request as pure data; who sends it, to which server, is not its business.

    Args:
        method: ``GET`` or ``POST``.
        path: From the root, with its query: ``/pause?mode=keep``.
        body: Sent as it is; empty for none.
        headers: Further headers, besides host, content length and content type (JSON).
    """

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class HttpResponse(msgspec.Struct, frozen=True, eq=False):
    """An answer, whole: status, headers with lower-case names, body.

    Args:
        status: The HTTP status.
        headers: Lower-case name to value; a repeated header's values are joined with ``, ``.
        body: The payload after transfer coding is undone.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class TimeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The named limits of one HTTP exchange, in seconds; none is infinite.

    Args:
        connect_s: Name resolution, TCP and TLS together.
        first_byte_s: From the request's last byte to the answer's first.
        idle_s: Between two reads of the answer.
        total_s: The whole exchange.
    """

    connect_s: float
    first_byte_s: float
    idle_s: float
    total_s: float

    @classmethod
    def of(cls, total_s: float, *, connect_s: float = 10.0) -> Self:
        """The limits of a call of which only the whole matters."""
        return cls(connect_s=min(connect_s, total_s), first_byte_s=total_s, idle_s=total_s,
                   total_s=total_s)  # fmt: skip
