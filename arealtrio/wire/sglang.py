"""The dialect of SGLang's native server, as version 0.5.23 speaks it.

``/generate`` is token in, token out, and reports which weights made which token.
tests/golden/sglang-0.5.23 holds real exchanges of every route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from .._core.logprobs import Scanner, encode_ids
from ..errors import ConfigError, InvalidRequest, ProtocolError
from ..types import Float32Array, HttpRequest, HttpResponse, Int32Array, PauseMode, StopReason
from . import body, metrics
from .dialect import (
    SegmentRequest,
    SegmentResponse,
    ServerInfo,
    ServerLoad,
    StreamParser,
    VersionSpan,
)
from .experts import read_int32
from .segment import check_segment, images_of, top_k_of
from .sglang_weights import SglangWeights
from .status import check_status, raise_refusal
from .stream import (
    End,
    Failure,
    Logprob,
    News,
    TokenId,
    TokenStream,
    decode_event,
)
from .tokens import NOTHING, Column, check_same, check_tokens, scan
from .versions import Span, read_label, read_spans

T = TypeVar("T")

SERVER: Final = "SGLang"

# ``keep`` is vLLM's name for: hold every request, and go on with it under the new weights. Both
# ``retract`` and ``in_place`` do that, but only ``retract`` lets go of the cache that the old
# weights made; without that /update_weights_from_disk can not drop it, and says that it failed.
PAUSE_MODES: Final = {
    "keep": "retract", "retract": "retract", "in_place": "in_place", "abort": "abort",
}  # fmt: skip

STOP_REASONS: Final[dict[str, StopReason]] = {"stop": "stop", "length": "length", "abort": "abort"}

# Its mark on an answer whose logits were not numbers, written as if a stop string had matched.
NAN_MARK: Final = "NaN happened"
# Older servers give tokens of another request along with this.
BEFORE_PREFILL: Final = "Abort before prefill"

LOAD_METRICS: Final = {
    "sglang:num_running_reqs": True,
    "sglang:num_queue_reqs": True,
    "sglang:num_requests_total": False,  # not there before the first request is done
    "sglang:num_retracted_reqs": False,  # a gauge: those that are out now
    "sglang:token_usage": False,
}

IDS: Final = "output_ids"
PAIRS: Final = "meta_info.output_token_logprobs"

SCANNER: Final = Scanner(
    {IDS: "ids", PAIRS: "pairs", "meta_info.input_token_logprobs": "drop", "text": "drop"}
)


class _FinishReason(msgspec.Struct):
    type: str
    message: str | None = None
    matched: Any = None  # an id, ids, or the text of a stop string


class _MetaInfo(msgspec.Struct):
    finish_reason: _FinishReason
    weight_versions: list[Span] | None = None
    routed_experts: bytes | None = None  # base64 of int32, without a shape


class _Answer(msgspec.Struct):
    meta_info: _MetaInfo


class _Progress(msgspec.Struct):
    finish_reason: _FinishReason | None = None
    completion_tokens: int | None = None  # so far, whatever the event repeats of them
    output_token_logprobs: list[tuple[Logprob, TokenId, Any]] | None = None
    weight_versions: list[Span] | None = None


class _Event(msgspec.Struct):
    output_ids: list[TokenId] | None = None
    meta_info: _Progress | None = None
    error: Failure | str | None = None


EVENT: Final = msgspec.json.Decoder(_Event)


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _ModelInfo(msgspec.Struct):
    weight_version: str | None = None


class _InternalState(msgspec.Struct):
    effective_max_running_requests_per_dp: int | None = None


class _ServerInfo(msgspec.Struct):
    context_length: int | None = None
    max_running_requests: int | None = None
    incremental_streaming_output: bool = False
    enable_weights_cpu_backup: bool = False
    enable_return_routed_experts: bool | None = None
    internal_states: list[_InternalState] = []  # one for each data-parallel scheduler


class _Control(msgspec.Struct):
    success: bool = True
    message: str = ""


class SglangDialect(SglangWeights):
    """Requests and answers of an SGLang server. Immutable; one instance serves every server."""

    name = "sglang"
    dies_of_unknown_ids = True
    __slots__ = ()

    def discover(self) -> Sequence[HttpRequest]:
        """Ask for the models, the configuration, and the weights' label."""
        return (body.get("/v1/models"), body.get("/server_info"), self.weight_version())

    def parse_discover(self, responses: Sequence[HttpResponse]) -> ServerInfo:
        """Read what the server is; SGLang nowhere tells its vocabulary size.

        An id outside the vocabulary ends the server, so configure ``vocab_size`` for it. Its
        logprobs are those of the softmax after the temperature, before top-p and top-k.
        """
        models, info, weights = responses
        listed = body.read_if_there(models, _Models, SERVER, "a list of models") or _Models()
        config = body.read_if_there(info, _ServerInfo, SERVER, "its configuration") or _ServerInfo()
        model = listed.data[0] if listed.data else None
        return ServerInfo(
            model=model.id if model else None,
            max_model_len=body.known((model and model.max_model_len) or config.context_length),
            max_concurrency=body.known(_concurrency(config)),
            weight_version=None if weights.status == 404 else self.parse_weight_version(weights),
            token_in_token_out=True,
            streams_news=config.incremental_streaming_output,
            logprobs_tempered=True,
            weights_backed_up=config.enable_weights_cpu_backup,
            tells_experts=config.enable_return_routed_experts,
        )

    def generate(
        self, segment: SegmentRequest, info: ServerInfo, *, stream: bool = False
    ) -> HttpRequest:
        """Ask for tokens by ``/generate``; ``rid`` is the id that ``abort`` names.

        Of a chat its images are sent, and the caller's token ids: SGLang's own chat route tells no
        token ids.

        Raises:
            InvalidRequest: What ``check_segment`` refuses, and a chat without its token ids.
        """
        check_segment(segment, info)
        if not len(segment.token_ids):
            raise InvalidRequest(
                "a chat on SGLang needs its input_ids too, with a placeholder for each image: "
                "SGLang does not tell what tokens it makes of messages"
            )
        question: dict[str, Any] = {
            "rid": segment.request_id,
            "input_ids": msgspec.Raw(encode_ids(segment.token_ids)),
            "sampling_params": _sampling(segment, info),
            "return_logprob": True,
            "stream": stream,
        }
        if segment.gconfig.lora_name:
            question["lora_path"] = segment.model or segment.gconfig.lora_name
        if segment.messages:
            question["image_data"] = images_of(segment.messages)
        if segment.gconfig.return_routed_experts:
            question["return_routed_experts"] = True
            question["routed_experts_start_len"] = segment.experts_from
        return body.post("/generate", question)

    def parse_generate(
        self,
        response: HttpResponse,
        info: ServerInfo,  # noqa: ARG002  there is one route
        *,
        chat: bool = False,  # noqa: ARG002  likewise
    ) -> SegmentResponse:
        """Read an answer.

        ``meta_info.weight_version`` alone, which servers before ``weight_versions`` have, is the
        label when the answer ended: it says nothing certain about any token, and is not read.

        Raises:
            ProtocolError: Also where the lists differ, a logprob is missing or not finite, the
                finish reason is unknown, or the spans do not cover the tokens.
            ServerError: Where the server found its logits not to be numbers.
        """
        columns, rest = scan(SCANNER, response, SERVER)
        answer = body.decode(rest, _Answer, response, f"a generation from {SERVER}").meta_info
        if answer.finish_reason.matched == NAN_MARK:
            raise_refusal(response, SERVER, "its logits were not numbers")
        return _segment_response(answer, columns)

    def stream_parser(self, secrets: Sequence[str] = ()) -> StreamParser:
        """Read a stream whose events hold all tokens so far, or the new ones alone.

        The former is the default: n tokens arrive as n²/2. With ``--incremental-streaming-output``
        each comes once.
        """
        return TokenStream(SERVER, _read_event, secrets)

    def abort(
        self,
        request_id: str,
        info: ServerInfo,  # noqa: ARG002  there is one route
        *,
        chat: bool = False,  # noqa: ARG002  likewise
    ) -> HttpRequest:
        """Stop one request by its ``rid``."""
        return body.post("/abort_request", {"rid": request_id})

    def pause(self, mode: PauseMode) -> HttpRequest:
        """Stop generating: ``retract`` (or ``keep``), ``in_place`` or ``abort``.

        ``retract`` puts the running requests back into the queue, to compute their keys and values
        again under the weights that they then meet. ``in_place`` freezes them with their cache, so
        that weights can not be loaded with ``load_weights`` while any is there. ``abort`` returns
        what is there; SGLang looks once a second whether all are out.

        Raises:
            ConfigError: For a mode of another dialect.
        """
        if mode not in PAUSE_MODES:
            raise ConfigError(
                f"pause mode {mode!r} is not one of {SERVER}'s: {', '.join(PAUSE_MODES)}"
            )
        return body.post("/pause_generation", {"mode": PAUSE_MODES[mode]})

    def resume(self) -> HttpRequest:
        """Go on generating."""
        return body.post("/continue_generation", {})

    def load_weights(self, path: str, version: int) -> Sequence[HttpRequest]:
        """Load, drop the cache and set the label, in the one request that does all three."""
        question = {
            "model_path": path,
            "weight_version": str(version),
            "flush_cache": True,
            "abort_all_requests": False,
        }
        return (body.post("/update_weights_from_disk", question),)

    def label_weights(self, version: int) -> HttpRequest:
        """Set the label; left alone, SGLang would abort every request to do it."""
        question = {"new_version": str(version), "abort_all_requests": False}
        return body.post("/update_weight_version", question)

    def parse_control(self, response: HttpResponse) -> None:
        """Read an answer to a command; those about requests and memory say nothing."""
        check_status(response, SERVER)
        if response.body in (b"", b"null"):
            return
        answer = body.decode(response.body, _Control, response, f"a command's answer from {SERVER}")
        if not answer.success:
            raise_refusal(response, SERVER, answer.message or "the body says success: false")

    def health(self) -> HttpRequest:
        """Ask whether the engine is alive; when idle it generates a token first, for a second."""
        return body.get("/health")

    def parse_health(self, response: HttpResponse) -> None:
        """Raise unless 2xx."""
        check_status(response, SERVER)

    def load(self) -> HttpRequest:
        """Ask for the gauges, which are there with ``--enable-metrics``."""
        return body.get("/metrics")

    def parse_load(self, response: HttpResponse) -> ServerLoad:
        """Add up the gauges of all its schedulers; of their caches, the fullest counts."""
        found = metrics.read_samples(response, SERVER, LOAD_METRICS).values()
        running, waiting, finished, retracted, usage = found
        return ServerLoad(
            running=int(sum(running)),
            waiting=int(sum(waiting)),
            requests_finished=int(sum(finished)),
            preempted=int(sum(retracted)),
            kv_cache_usage=max(usage, default=0.0),
        )

    def started(self) -> HttpRequest | None:
        """SGLang does not tell."""
        return None

    def parse_started(self, response: HttpResponse) -> float | None:  # noqa: ARG002  likewise
        """Nothing."""
        return None

    def sleeping(self) -> HttpRequest | None:
        """SGLang does not tell, and one that is awake dies of being woken."""
        return None

    def parse_sleeping(self, response: HttpResponse) -> bool:  # noqa: ARG002  nothing is asked
        """Nothing."""
        return False

    def weight_version(self) -> HttpRequest:
        """Ask for the label."""
        return body.get("/model_info")

    def parse_weight_version(self, response: HttpResponse) -> int | None:
        """Read it; a server that nobody updated says ``default``."""
        return read_label(body.read(response, _ModelInfo, SERVER, "model info").weight_version)


def _concurrency(config: _ServerInfo) -> int | None:
    """What the schedulers settled on; the configured number is a wish, and may be missing."""
    settled = [state.effective_max_running_requests_per_dp for state in config.internal_states]
    known = [limit for limit in settled if limit is not None]
    return sum(known) if known and len(known) == len(settled) else config.max_running_requests


def _sampling(segment: SegmentRequest, info: ServerInfo) -> dict[str, Any]:
    """Every value is sent: what is left out is taken from ``--preferred-sampling-params``."""
    gconfig = segment.gconfig
    sampling: dict[str, Any] = {
        "max_new_tokens": segment.max_new_tokens,
        "min_new_tokens": segment.min_new_tokens,
        "temperature": 0.0 if gconfig.greedy else gconfig.temperature,
        "top_p": gconfig.top_p,
        "top_k": top_k_of(segment, info),
        "min_p": gconfig.min_p,
        "frequency_penalty": gconfig.frequency_penalty,
        "presence_penalty": gconfig.presence_penalty,
        "repetition_penalty": gconfig.repetition_penalty,
        "ignore_eos": gconfig.ignore_eos,
        "skip_special_tokens": gconfig.skip_special_tokens,
        "stop_token_ids": gconfig.stop_token_ids,
    }
    if gconfig.stop:
        sampling["stop"] = gconfig.stop
    if segment.seed is not None:
        sampling["sampling_seed"] = segment.seed
    return sampling


def _segment_response(answer: _MetaInfo, columns: dict[str, Column]) -> SegmentResponse:
    stop_reason = _stop_reason(answer.finish_reason)
    message = answer.finish_reason.message or ""
    if stop_reason == "abort" and _brings_none(message, columns):
        return SegmentResponse(
            token_ids=np.empty(0, dtype=np.int32),
            logprobs=np.empty(0, dtype=np.float32),
            stop_reason=stop_reason,
            versions=(),
            message=message,
        )
    ids, logprobs = _tokens(columns)
    return SegmentResponse(
        token_ids=ids,
        logprobs=logprobs,
        stop_reason=stop_reason,
        versions=_spans(answer, len(ids)),
        message=message,
        routed_experts=read_int32(answer.routed_experts, SERVER),
    )


def _read_event(event: bytes, count: int) -> News | Failure | None:
    said = decode_event(EVENT, event, SERVER)
    if said.error is not None:
        return Failure.of(said.error)
    if said.meta_info is None:
        raise ProtocolError(f"expected meta_info in every event from {SERVER}")
    end = _end(said.meta_info)
    if end is not None and end.stop_reason == "abort" and _is_barren(end.message, said):
        return News(end=end)
    return News(*_news(said.output_ids, said.meta_info, count), end)


def _is_barren(message: str, said: _Event) -> bool:
    """``_brings_none`` of an event."""
    pairs = said.meta_info and said.meta_info.output_token_logprobs
    return message.startswith(BEFORE_PREFILL) or (pairs is None and not said.output_ids)


def _end(said: _Progress) -> End | None:
    reason = said.finish_reason
    if reason is None:
        return None
    if reason.matched == NAN_MARK:  # what came before is not to be believed either
        raise ProtocolError(f"expected logits from {SERVER}, they were not numbers")
    return End(_stop_reason(reason), said.weight_versions, reason.message or "")


def _news(ids: list[int] | None, said: _Progress, count: int) -> tuple[list[int], list[Logprob]]:
    """The tokens behind the first ``count``: the end of a list of all, or a list of no others.

    Lists are looked at each for itself, since servers shorten one and not the other.
    """
    total, pairs = said.completion_tokens, said.output_token_logprobs
    if total is None or total < count:
        raise ProtocolError(f"expected completion_tokens from {SERVER} that never go back")
    if pairs is None:
        raise ProtocolError(f"expected token ids and logprobs from {SERVER}, got no logprobs")
    new = _last(pairs, total, count)
    described = [token_id for _, token_id, _ in new]
    if ids is not None and _last(ids, total, count) != described:
        raise ProtocolError(f"expected logprobs of the tokens from {SERVER}, got those of others")
    return described, [logprob for logprob, _, _ in new]


def _last(column: list[T], total: int, count: int) -> list[T]:
    if len(column) == total - count:
        return column
    if len(column) != total:
        raise ProtocolError(
            f"expected {total} tokens or the last {total - count} of them from {SERVER}, "
            f"got {len(column)}"
        )
    return column[count:]


def _stop_reason(finish_reason: _FinishReason) -> StopReason:
    if finish_reason.type not in STOP_REASONS:
        raise ProtocolError(
            f"expected a finish reason of {', '.join(STOP_REASONS)} from {SERVER}, "
            f"got {finish_reason.type[:20]!r}"
        )
    return STOP_REASONS[finish_reason.type]


def _brings_none(message: str, columns: dict[str, Column]) -> bool:
    """A request that was aborted in the queue has an empty list of ids, and perhaps no logprobs."""
    ids, _ = columns[IDS] or NOTHING
    is_empty = columns[PAIRS] is None and (ids is None or len(ids) == 0)
    return is_empty or message.startswith(BEFORE_PREFILL)


def _tokens(columns: dict[str, Column]) -> tuple[Int32Array, Float32Array]:
    ids, _ = columns[IDS] or NOTHING
    pair_ids, logprobs = columns[PAIRS] or NOTHING
    check_same(ids, pair_ids, SERVER)
    return check_tokens(ids if pair_ids is None else pair_ids, logprobs, SERVER)


def _spans(answer: _MetaInfo, token_count: int) -> tuple[VersionSpan, ...] | None:
    if answer.weight_versions is None:
        return None
    return read_spans(answer.weight_versions, token_count)
