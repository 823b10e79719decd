"""The dialect of vLLM's OpenAI-compatible server, as version 0.32.0 speaks it.

Two routes give tokens. ``/inference/v1/generate`` (there with ``--enable-scale-out``) is token in,
token out and reports which weights made which token; ``/v1/completions`` is always there and
reports none. What changes or inspects a running server (pause, abort, weights) is there only
with ``VLLM_SERVER_DEV_MODE=1``. tests/golden/vllm-0.32.0 holds real exchanges of every route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from .._core.logprobs import Scanner, encode_ids
from ..errors import ConfigError, ProtocolError
from ..types import (
    Float32Array,
    HttpRequest,
    HttpResponse,
    Int32Array,
    PauseMode,
)
from . import body, metrics
from .dialect import (
    SegmentRequest,
    SegmentResponse,
    ServerInfo,
    ServerLoad,
    StreamParser,
    VersionSpan,
)
from .experts import read_npy
from .segment import check_segment, top_k_of
from .status import check_status, kind_of_body, raise_refusal
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
from .versions import read_label, read_spans
from .vllm_chat import CHAT_ROUTE, chat_fields, parse_chat
from .vllm_choice import SERVER, Choice, stop_reason_of
from .vllm_weights import RESET_CACHE, VllmWeights

TOKEN_ROUTE: Final = "/inference/v1/generate"
ADAPTER_DONE: Final = b"Success: "  # about adapters it speaks plain text
PAUSE_MODES: Final = ("keep", "abort", "wait")

LOAD_METRICS: Final = {
    "vllm:num_requests_running": True,
    "vllm:num_requests_waiting": True,
    "vllm:request_success_total": True,
    "vllm:num_preemptions_total": False,
    "vllm:kv_cache_usage_perc": False,  # a share, in spite of its name
}

PROCESS_START: Final = "process_start_time_seconds"

# Whether the values that a mode gives are of the distribution that was sampled from.
LOGPROBS_MODES: Final = {"raw_logprobs": False, "processed_logprobs": True}

# The token route has IDS and RECORDS; completions has LOGPROBS, and IDS or, on old servers, only
# TOKEN_STRINGS. ``text_offset`` counts characters of "token_id:1", and ``top_logprobs`` repeats the
# chosen token.
CHOICE: Final = "choices.0."
IDS: Final = CHOICE + "token_ids"
RECORDS: Final = CHOICE + "logprobs.content"
LOGPROBS: Final = CHOICE + "logprobs.token_logprobs"
TOKEN_STRINGS: Final = CHOICE + "logprobs.tokens"

SCANNER: Final = Scanner(
    {
        IDS: "ids",
        RECORDS: "records",
        LOGPROBS: "floats",
        TOKEN_STRINGS: "token_strings",
        CHOICE + "logprobs.top_logprobs": "drop",
        CHOICE + "logprobs.text_offset": "drop",
        CHOICE + "prompt_token_ids": "drop",
        CHOICE + "text": "drop",
    }
)


class _Answer(msgspec.Struct):
    choices: list[Choice]


class _Record(msgspec.Struct):
    token_id: TokenId
    logprob: Logprob = None


class _EventLogprobs(msgspec.Struct):
    content: list[_Record] | None = None
    token_logprobs: list[Logprob] | None = None
    tokens: list[str] | None = None


class _EventChoice(Choice):
    token_ids: list[TokenId] | None = None
    logprobs: _EventLogprobs | None = None


class _Event(msgspec.Struct):
    choices: list[_EventChoice] = []  # none in the event that tells the usage
    error: Failure | str | None = None


EVENT: Final = msgspec.json.Decoder(_Event)


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _ModelConfig(msgspec.Struct):
    max_model_len: int | None = None
    logprobs_mode: str | None = None


class _SchedulerConfig(msgspec.Struct):
    max_num_seqs: int | None = None


class _ParallelConfig(msgspec.Struct):
    data_parallel_size_local: int = 1


class _AuxOutputConfig(msgspec.Struct):
    enable_return_routed_experts: bool | None = None


class _VllmConfig(msgspec.Struct):
    model_config: _ModelConfig = msgspec.field(default_factory=_ModelConfig)
    scheduler_config: _SchedulerConfig = msgspec.field(default_factory=_SchedulerConfig)
    parallel_config: _ParallelConfig = msgspec.field(default_factory=_ParallelConfig)
    aux_output_config: _AuxOutputConfig = msgspec.field(default_factory=_AuxOutputConfig)


class _ServerInfo(msgspec.Struct):
    vllm_config: _VllmConfig | str  # a string where the server is too old for config_format=json


class _WeightInfo(msgspec.Struct):
    weight_version: str


class _Sleep(msgspec.Struct):
    is_sleeping: bool


class _Control(msgspec.Struct):
    success: bool = True
    results: list[Any] = []  # of collective_rpc, one for each worker


class VllmDialect(VllmWeights):
    """Requests and answers of a vLLM server. Immutable; one instance serves every server."""

    name = "vllm"
    dies_of_unknown_ids = False
    __slots__ = ()

    def discover(self) -> Sequence[HttpRequest]:
        """Ask for the models, the configuration, the weights' label, and the token route.

        The route is probed by a GET, which vLLM answers with 405 where the route is and with 404
        where it is not. Its list of routes, /openapi.json, is 340 KB.
        """
        return (
            body.get("/v1/models"),
            body.get("/server_info?config_format=json"),
            self.weight_version(),
            body.get(TOKEN_ROUTE),
        )

    def parse_discover(self, responses: Sequence[HttpResponse]) -> ServerInfo:
        """Read what the server is; vLLM nowhere tells its vocabulary size.

        ``max_concurrency`` is ``max_num_seqs`` times the engines that this server runs itself
        (data parallel), each of which has its own scheduler.

        Raises:
            ProtocolError: Also for a server whose ``--logprobs-mode`` gives no logprobs but logits.
        """
        models, info, weights, probe = responses
        model = _first_model(models)
        config = _read_config(info)
        return ServerInfo(
            model=model.id if model else None,
            max_model_len=body.known((model or config.model_config).max_model_len),
            max_concurrency=body.known(_concurrency(config)),
            weight_version=None if weights.status == 404 else self.parse_weight_version(weights),
            token_in_token_out=_has_route(probe),
            streams_news=True,
            logprobs_tempered=_logprobs_tempered(config),
            tells_experts=config.aux_output_config.enable_return_routed_experts,
        )

    def generate(
        self, segment: SegmentRequest, info: ServerInfo, *, stream: bool = False
    ) -> HttpRequest:
        """Ask for tokens, by ``/inference/v1/generate`` where it is there, of a chat by its route.

        The id goes into the body and into ``X-Request-Id``, which vLLM prefers: a proxy that
        writes that header where it is missing would otherwise rename the request, and no abort
        would find it.

        Raises:
            InvalidRequest: What ``check_segment`` refuses.
        """
        check_segment(segment, info)
        question: dict[str, Any] = {"request_id": segment.request_id}
        if model := segment.model or info.model:
            question["model"] = model
        if stream:
            question["stream"] = True
        headers = (("X-Request-Id", segment.request_id),)
        if segment.messages:
            question |= _sampling(segment, info) | chat_fields(segment.messages)
            return body.post(CHAT_ROUTE, question, headers)
        if info.token_in_token_out:
            question["token_ids"] = _ids(segment)
            question["sampling_params"] = _token_route_sampling(segment, info)
            return body.post(TOKEN_ROUTE, question, headers)
        question["prompt"] = _ids(segment)
        question |= _completions_sampling(segment, info)
        return body.post("/v1/completions", question, headers)

    def parse_generate(
        self,
        response: HttpResponse,
        info: ServerInfo,  # noqa: ARG002  both routes are told apart by what they answer
        *,
        chat: bool = False,
    ) -> SegmentResponse:
        """Read the one choice of an answer.

        Raises:
            ProtocolError: Also where the lists differ in length, a logprob is missing or not
                finite, the finish reason is unknown, or the spans do not cover the tokens.
        """
        if chat:
            return parse_chat(response)
        columns, rest = scan(SCANNER, response, SERVER)
        answer = body.decode(rest, _Answer, response, f"a generation from {SERVER}")
        if len(answer.choices) != 1:
            raise ProtocolError(f"expected 1 choice from {SERVER}, got {len(answer.choices)}")
        return _segment_response(answer.choices[0], columns)

    def stream_parser(self, secrets: Sequence[str] = ()) -> StreamParser:
        """Read a stream of either route; version spans come with its last tokens."""
        return TokenStream(SERVER, _read_event, secrets)

    def abort(self, request_id: str, info: ServerInfo, *, chat: bool = False) -> HttpRequest:
        """Stop one request by the id that vLLM made of ours.

        It puts the route's name before it, and for completions the prompt's index behind it.
        """
        if chat:
            return body.post("/abort_requests", {"request_ids": [f"chatcmpl-{request_id}"]})
        if info.token_in_token_out:
            ids = [f"generate-tokens-{request_id}"]
            return body.post("/inference/v1/abort_requests", {"request_ids": ids})
        return body.post("/abort_requests", {"request_ids": [f"cmpl-{request_id}-0"]})

    def pause(self, mode: PauseMode) -> HttpRequest:
        """Stop generating: ``keep`` freezes, ``abort`` returns what is there, ``wait`` finishes.

        Raises:
            ConfigError: For a mode of another dialect.
        """
        if mode not in PAUSE_MODES:
            raise ConfigError(
                f"pause mode {mode!r} is not one of {SERVER}'s: {', '.join(PAUSE_MODES)}"
            )
        return body.post(f"/pause?mode={mode}")

    def resume(self) -> HttpRequest:
        """Go on generating; 200 also when not paused."""
        return body.post("/resume")

    def load_weights(self, path: str, version: int) -> Sequence[HttpRequest]:
        """Set the label, load, drop the cache.

        The label comes first, of a server that is paused: one that dies and is started again before
        the end has its first weights, and does not have the label when it is asked for it.

        ``reset_running_requests`` puts frozen requests back into the queue, so that their keys and
        values are computed again by the new weights, as AReaL's interruptible generation does
        (arXiv 2505.24298 §4.1); without it vLLM refuses to drop a cache that anything still uses.
        """
        reload = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        return (
            self.label_weights(version),
            body.post("/collective_rpc", reload),
            body.post(RESET_CACHE),
        )

    def label_weights(self, version: int) -> HttpRequest:
        """Set the label that the token route reports and ``/weight_info`` tells."""
        return body.post("/update_weight_version", {"new_version": str(version)})

    def parse_control(self, response: HttpResponse) -> None:
        """Read an answer to a command; ``/inference/v1/abort_requests`` answers with nothing."""
        check_status(response, SERVER)
        if not response.body or response.body.startswith(ADAPTER_DONE):
            return
        answer = body.decode(response.body, _Control, response, f"a command's answer from {SERVER}")
        if not answer.success:
            raise_refusal(response, SERVER, "the body says success: false")
        for result in answer.results:
            if isinstance(result, dict) and "error" in result:
                error = result["error"]
                words = error if isinstance(error, str) else "a worker says so without words"
                raise_refusal(response, SERVER, words)

    def health(self) -> HttpRequest:
        """Ask whether the engine is alive; answered also while paused."""
        return body.get("/health")

    def parse_health(self, response: HttpResponse) -> None:
        """Raise unless 2xx."""
        check_status(response, SERVER)

    def load(self) -> HttpRequest:
        """Ask for the gauges; ``/load`` reads 0 whatever the server does."""
        return body.get("/metrics")

    def parse_load(self, response: HttpResponse) -> ServerLoad:
        """Add up the gauges of all its engines; of their caches, the fullest counts."""
        found = metrics.read_samples(response, SERVER, LOAD_METRICS).values()
        running, waiting, finished, preemptions, usage = found
        return ServerLoad(
            running=int(sum(running)),
            waiting=int(sum(waiting)),
            requests_finished=int(sum(finished)),
            preemptions=int(sum(preemptions)),
            kv_cache_usage=max(usage, default=0.0),
        )

    def started(self) -> HttpRequest | None:
        """Ask for the gauges, among which it is."""
        return body.get("/metrics")

    def parse_started(self, response: HttpResponse) -> float | None:
        """Read it; several processes in front of one engine (``--api-server-count``) tell none."""
        found = metrics.read_samples(response, SERVER, {PROCESS_START: False})[PROCESS_START]
        return found[0] if len(found) == 1 else None

    def sleeping(self) -> HttpRequest | None:
        """Ask a development route; a server without them can not be put to sleep either."""
        return body.get("/is_sleeping")

    def parse_sleeping(self, response: HttpResponse) -> bool:
        """Read it, whether all of its memory sleeps or a part."""
        if response.status == 404:
            return False
        return body.read(response, _Sleep, SERVER, "whether it sleeps").is_sleeping

    def weight_version(self) -> HttpRequest:
        """Ask for the label."""
        return body.get("/weight_info")

    def parse_weight_version(self, response: HttpResponse) -> int | None:
        """Read it; a server that nobody updated says ``default``."""
        return read_label(
            body.read(response, _WeightInfo, SERVER, "a weight version").weight_version
        )


def _ids(segment: SegmentRequest) -> msgspec.Raw:
    return msgspec.Raw(encode_ids(segment.token_ids))


def _sampling(segment: SegmentRequest, info: ServerInfo) -> dict[str, Any]:
    """What both routes name alike.

    Every value is sent, also where it is vLLM's documented default: what is left out is taken from
    the model's generation_config.json, and the trainer would learn from another distribution than
    it configured.
    """
    gconfig = segment.gconfig
    sampling: dict[str, Any] = {
        "max_tokens": segment.max_new_tokens,
        "min_tokens": segment.min_new_tokens,
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
        "logprobs": 0,  # of the chosen token alone
    }
    if gconfig.stop:
        sampling["stop"] = gconfig.stop
    if segment.seed is not None:
        sampling["seed"] = segment.seed
    if segment.experts_from:  # that they are told at all is the server's setting, not a request's
        sampling["routed_experts_prompt_start"] = segment.experts_from
    return sampling


def _token_route_sampling(segment: SegmentRequest, info: ServerInfo) -> dict[str, Any]:
    """Text is made only where stop strings are looked for in it."""
    sampling = _sampling(segment, info)
    sampling["detokenize"] = bool(segment.gconfig.stop)
    return sampling


def _completions_sampling(segment: SegmentRequest, info: ServerInfo) -> dict[str, Any]:
    """Servers before ``return_token_ids`` ignore it, and give the ids as ``token_id:N`` strings."""
    return _sampling(segment, info) | {
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _first_model(response: HttpResponse) -> _Model | None:
    """The base model, which vLLM lists before its adapters."""
    models = body.read_if_there(response, _Models, SERVER, "a list of models")
    if models is None:
        return None
    if not models.data:
        raise ProtocolError(f"expected at least one model from {SERVER}")
    return models.data[0]


def _read_config(response: HttpResponse) -> _VllmConfig:
    """The configuration, empty where the server does not give it as JSON."""
    info = body.read_if_there(response, _ServerInfo, SERVER, "its configuration")
    if info is None or isinstance(info.vllm_config, str):
        return _VllmConfig()
    return info.vllm_config


def _concurrency(config: _VllmConfig) -> int | None:
    max_num_seqs = config.scheduler_config.max_num_seqs
    engines = max(1, config.parallel_config.data_parallel_size_local)
    return None if max_num_seqs is None else max_num_seqs * engines


def _logprobs_tempered(config: _VllmConfig) -> bool | None:
    """None where it is not told; vLLM's default is the model's own, before the temperature."""
    mode = config.model_config.logprobs_mode
    if mode is not None and mode not in LOGPROBS_MODES:
        raise ProtocolError(
            f"expected logprobs from {SERVER}, but it runs with --logprobs-mode {mode[:20]!r}; "
            f"start it with {' or '.join(LOGPROBS_MODES)}"
        )
    return None if mode is None else LOGPROBS_MODES[mode]


def _has_route(probe: HttpResponse) -> bool:
    """Whether a GET met a POST-only route.

    Anything but vLLM's two answers is refused, not taken for a no: without the route the versions
    of tokens would be beliefs from then on. A 404 is vLLM's own only in its words.
    """
    if probe.status == 405:
        return True
    if probe.status == 404 and b'"Not Found"' in probe.body:
        return False
    if probe.status != 404:
        check_status(probe, SERVER)
    raise ProtocolError(
        f"expected 404 or 405 for a GET of {TOKEN_ROUTE} from {SERVER}, got {probe.status} with "
        f"{kind_of_body(probe)}; is something between that answers for it?"
    )


def _segment_response(choice: Choice, columns: dict[str, Column]) -> SegmentResponse:
    ids, logprobs = _tokens(columns)
    return SegmentResponse(
        token_ids=ids,
        logprobs=logprobs,
        stop_reason=stop_reason_of(choice),
        versions=_spans(choice, len(ids)),
        routed_experts=read_npy(choice.routed_experts, SERVER),
    )


def _read_event(event: bytes, count: int) -> News | Failure | None:  # noqa: ARG001  it says the new
    said = decode_event(EVENT, event, SERVER)
    if said.error is not None:
        return Failure.of(said.error)
    if not said.choices:
        return None
    if len(said.choices) != 1:
        raise ProtocolError(f"expected 1 choice from {SERVER}, got {len(said.choices)}")
    choice = said.choices[0]
    end = None
    if choice.finish_reason is not None:
        end = End(stop_reason_of(choice), choice.weight_versions)
    return News(*_new_tokens(choice), end)


def _new_tokens(choice: _EventChoice) -> tuple[Sequence[int], Sequence[Logprob]]:
    """What ``_tokens`` reads of a whole answer. There may be none: the last may end alone."""
    told = choice.logprobs or _EventLogprobs()
    ids = choice.token_ids
    if told.content is not None:
        described = [record.token_id for record in told.content]
        if ids is not None and ids != described:
            raise ProtocolError(
                f"expected logprobs of the tokens from {SERVER}, got those of others"
            )
        return described, [record.logprob for record in told.content]
    if ids is None:
        ids = _ids_of(told.tokens or ())
    return ids, told.token_logprobs or ()


def _ids_of(strings: Sequence[str]) -> list[int]:
    """Old servers name tokens in words, ``token_id:1``, and not otherwise."""
    numbers = [string.removeprefix("token_id:") for string in strings]
    ids = [number for number in map(read_label, numbers) if number is not None]
    if len(ids) != len(strings):
        raise ProtocolError(f"expected token ids from {SERVER}, got text")
    return ids


def _spans(choice: Choice, token_count: int) -> tuple[VersionSpan, ...] | None:
    """None on a route without the field, and where vLLM knows no label for the tokens."""
    if choice.weight_versions is None:
        return None
    return read_spans(choice.weight_versions, token_count)


def _tokens(columns: dict[str, Column]) -> tuple[Int32Array, Float32Array]:
    """What either route says: ids twice on the token route, ids or strings on completions."""
    ids, _ = columns[IDS] or NOTHING
    if (records := columns[RECORDS]) is not None:
        check_same(ids, records[0], SERVER)
        return check_tokens(records[0], records[1], SERVER)
    if ids is None:
        ids, _ = columns[TOKEN_STRINGS] or NOTHING
    _, logprobs = columns[LOGPROBS] or NOTHING
    return check_tokens(ids, logprobs, SERVER)
