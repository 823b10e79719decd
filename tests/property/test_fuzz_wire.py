"""Every codec: any answer is read or refused by name; any question is JSON or is not asked."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arealtrio.errors import (
    ConfigError,
    InvalidRequest,
    ProtocolError,
    RequestRejected,
    ServerError,
)
from arealtrio.types import (
    INT32_MAX,
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
    PauseMode,
    StopReason,
)
from arealtrio.wire.dialect import (
    Dialect,
    SegmentRequest,
    SegmentResponse,
    ServerInfo,
    ServerLoad,
)
from arealtrio.wire.events import EventReader
from arealtrio.wire.experts import read_int32, read_npy
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect
from arealtrio.wire.vllm_areal import ArealVllmDialect
from arealtrio.wire.weights import GroupPlace, TensorSpec

from ..golden import exchange
from .fuzzing import (
    SECRET,
    anything,
    bodies,
    changed,
    check_message,
    cut_places,
    damaged,
    json_values,
    pieces,
    written,
)

MANY = 3 * settings().max_examples
REFUSALS = (ProtocolError, RequestRejected, ServerError)
INFO = ServerInfo(token_in_token_out=True)
DIALECTS: list[Dialect] = [VllmDialect(), SglangDialect(), ArealVllmDialect()]
GOLDEN = {"vllm": "vllm-0.32.0", "sglang": "sglang-0.5.23", "vllm_areal": "vllm-0.32.0"}

every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)


def recorded(dialect: Dialect, suffix: str) -> list[bytes]:
    """Every recorded answer of that kind of file."""
    server = GOLDEN[dialect.name]
    return [
        exchange.answer(server, name).body
        for name in sorted(exchange.names(server))
        if name.endswith(suffix)
    ]


def documents(dialect: Dialect) -> list[Any]:
    """Every recorded answer that is JSON; an event of a stream is one."""
    texts = recorded(dialect, ".json")
    for stream in recorded(dialect, "_stream.txt"):
        texts += [line.removeprefix(b"data: ") for line in stream.split(b"\n\n")]
    found = []
    for text in texts:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


# What is read of each recording, alone: of a configuration of hundreds of fields, nearly every
# change is to one that nobody reads.
CHOICE = {
    "finish_reason": "length", "token_ids": [5, 6], "weight_versions": [
        {"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
}  # fmt: skip
VLLM = [
    {"data": [{"id": "tiny", "max_model_len": 64}]},
    {"vllm_config": {
        "model_config": {"max_model_len": 64, "logprobs_mode": "raw_logprobs"},
        "scheduler_config": {"max_num_seqs": 8}, "parallel_config": {"data_parallel_size_local": 2},
        "aux_output_config": {"enable_return_routed_experts": True}}},
    {"weight_version": "3"},
    {"success": True, "results": [{"error": "why"}, None]},
    {"choices": [CHOICE | {"logprobs": {"content": [
        {"token_id": 5, "logprob": -0.5}, {"token_id": 6, "logprob": -1.5}]}}]},
    {"choices": [CHOICE | {"logprobs": {
        "token_logprobs": [-0.5, -1], "tokens": ["token_id:5", "token_id:6"]}}]},
    {"prompt_token_ids": [1], "choices": [CHOICE | {"logprobs": {"content": [
        {"token": "token_id:5", "logprob": -0.5}, {"token": "token_id:6", "logprob": -1.5}]}}]},
    {"error": {"message": "why", "code": 400}},
]  # fmt: skip
SGLANG = [
    {"data": [{"id": "tiny", "max_model_len": 64}]},
    {"context_length": 64, "max_running_requests": 4, "incremental_streaming_output": True,
     "enable_weights_cpu_backup": True,
     "internal_states": [{"effective_max_running_requests_per_dp": 8}]},
    {"weight_version": "3"},
    {"success": True, "message": "why"},
    {"output_ids": [5, 6], "meta_info": {
        "finish_reason": {"type": "stop", "matched": 6}, "completion_tokens": 2,
        "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None]],
        "weight_versions": CHOICE["weight_versions"]}},
    {"error": {"message": "why", "code": 400}},
]  # fmt: skip
READ: dict[str, list[Any]] = {"vllm": VLLM, "vllm_areal": VLLM, "sglang": SGLANG}
DOCUMENTS = {d.name: documents(d) + 5 * READ[d.name] for d in DIALECTS}


# --- answers ---------------------------------------------------------------------------------


def parsers(dialect: Dialect) -> dict[str, Callable[[HttpResponse], Any]]:
    """Everything that reads one answer."""
    return {
        "generate": lambda answer: dialect.parse_generate(answer, ServerInfo()),
        "generate, tokens": lambda answer: dialect.parse_generate(answer, INFO),
        "chat": lambda answer: dialect.parse_generate(answer, INFO, chat=True),
        "control": dialect.parse_control,
        "health": dialect.parse_health,
        "load": dialect.parse_load,
        "weight version": dialect.parse_weight_version,
        **{
            f"discover {place}": partial(discover, dialect, place)
            for place in range(len(dialect.discover()))
        },
    }


def discover(dialect: Dialect, place: int, answer: HttpResponse) -> ServerInfo:
    """Read the answers of a server that has none of the routes but one."""
    missing = HttpResponse(404, {}, b"")
    count = len(dialect.discover())
    return dialect.parse_discover([answer if at == place else missing for at in range(count)])


def check_answer(read: Any) -> None:
    """What was read is of the documented types and ranges, whatever the server said."""
    if isinstance(read, SegmentResponse):
        check_segment(read)
    elif isinstance(read, ServerInfo):
        for number in (read.max_model_len, read.max_concurrency, read.vocab_size):
            assert number is None or number >= 1
        assert read.weight_version is None or 0 <= read.weight_version <= INT32_MAX
    elif isinstance(read, ServerLoad):
        assert {type(read.running), type(read.waiting), type(read.requests_finished)} == {int}
        assert math.isfinite(read.kv_cache_usage)
    else:
        assert read is None or 0 <= read <= INT32_MAX


def check_segment(segment: SegmentResponse) -> None:
    assert segment.token_ids.dtype == np.int32
    assert segment.logprobs.dtype == np.float32
    assert len(segment.token_ids) == len(segment.logprobs)
    assert np.isfinite(segment.logprobs).all()
    assert (segment.token_ids >= 0).all()
    assert segment.stop_reason in get_args(StopReason)
    at = 0
    for span in segment.versions or ():
        assert span.start == at < span.end
        at = span.end
    assert not segment.versions or at == len(segment.token_ids)


def check_line(error: Exception) -> None:
    if isinstance(error, ProtocolError):  # the others repeat what the server says is wrong
        check_message(error)
    assert len(str(error)) <= 400
    assert len(str(error).splitlines()) == 1


def check_reading(parse: Callable[[HttpResponse], Any], answer: HttpResponse) -> None:
    try:
        read = parse(answer)
    except REFUSALS as exc:
        check_line(exc)
    else:
        check_answer(read)


@every_dialect
@settings(max_examples=MANY)
@given(data=st.data(), status=st.sampled_from([200, 200, 200, 400, 404, 500, 302]))
def test_any_answer_is_read_or_refused_by_name(
    dialect: Dialect, data: st.DataObject, status: int
) -> None:
    body = data.draw(bodies(DOCUMENTS[dialect.name]))
    kind = data.draw(st.sampled_from(["application/json", "text/html; charset=x", "", "\x00"]))
    for parse in parsers(dialect).values():
        check_reading(parse, HttpResponse(status, {"content-type": kind}, body))


@every_dialect
@given(document=json_values, depth=st.sampled_from([5, 900, 100_000]))
@example(document=["@deep@"], depth=100_000)
@example(document={"error": {"message": "@deep@"}}, depth=900)
@example(document={"detail": [{"loc": ["@deep@"], "msg": "@deep@"}]}, depth=900)
@example(document={"success": True, "results": [{"error": "@deep@"}]}, depth=900)
@example(document=f'{{"error": {{"message": {SECRET}}}}}', depth=5)
def test_any_json_is_read_or_refused_by_name(dialect: Dialect, document: Any, depth: int) -> None:
    for parse in parsers(dialect).values():
        for status in (200, 400, 503):
            check_reading(parse, HttpResponse(status, {}, written(document, depth=depth)))


@pytest.mark.parametrize("key", ["error", "message", "detail", "error_message"])
@every_dialect
def test_a_reason_that_nests_is_looked_for_a_few_levels_down(dialect: Dialect, key: str) -> None:
    body = f'{{"{key}":'.encode() * 990 + b'"why"' + b"}" * 990
    with pytest.raises(ServerError, match="no reason given"):
        dialect.parse_control(HttpResponse(500, {}, body))


@every_dialect
@given(data=st.data())
def test_any_page_of_metrics_is_read_or_refused_by_name(
    dialect: Dialect, data: st.DataObject
) -> None:
    page = data.draw(st.sampled_from(recorded(dialect, ".prom")))
    lines = page.split(b"\n")
    wanted = [at for at, line in enumerate(lines) if b"requests" in line or b"_req" in line]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(wanted))
        name = lines[at].split(b" ")[0]
        value = data.draw(st.sampled_from([b"NaN", b"+Inf", b"1e308", b"-1e309", b"1" * 400, b"x",
                                           b"", b"0x1", b"1 2 3", b"\xff", b"1_0"]))  # fmt: skip
        change = st.sampled_from([name + b" " + value, name + b" 1e308\n" + name + b" 1e308"])
        lines[at] = data.draw(change | st.just(changed(data.draw, lines[at])))
    check_reading(dialect.parse_load, HttpResponse(200, {}, b"\n".join(lines)))


# --- streams ---------------------------------------------------------------------------------


@given(stream=st.lists(
    st.sampled_from([b"data: ", b"data:", b"\n", b"\r\n", b"\r", b":", b"event: x", b"{}", b"\xff"])
    | st.binary(max_size=3), max_size=30,
).map(b"".join), cuts=cut_places)  # fmt: skip
def test_events_are_the_same_wherever_the_bytes_are_cut(stream: bytes, cuts: list[int]) -> None:
    reader = EventReader()
    found = [event for piece in pieces(stream, cuts) for event in reader.feed(piece)]
    assert found == EventReader().feed(stream)
    one_by_one = EventReader()
    assert [event for at in range(len(stream)) for event in one_by_one.feed(stream[at : at + 1])] \
        == found  # fmt: skip


@every_dialect
@settings(max_examples=MANY)
@given(data=st.data(), cuts=cut_places)
def test_any_stream_is_read_or_refused_by_name_and_keeps_what_came(
    dialect: Dialect, data: st.DataObject, cuts: list[int]
) -> None:
    events = data.draw(st.lists(damaged(EVENTS[dialect.name]), max_size=4))
    stream = b"".join(b"data: " + written(event) + b"\n\n" for event in events)
    stream += data.draw(st.sampled_from([b"", b"data: [DONE]\n\n", b"data: [DONE", b"\n\n\n"]))
    if data.draw(st.booleans()):
        stream = changed(data.draw, stream)
    parser = dialect.stream_parser()
    try:
        for piece in pieces(stream, cuts):
            parser.feed(piece)
        segment = parser.answer()
    except ProtocolError as exc:
        check_message(exc)
        return
    except (ServerError, RequestRejected):
        segment = parser.arrived()  # what came before is kept
    assert len(segment.token_ids) == parser.count
    check_segment(segment)


EVENTS = {
    dialect.name: [
        document
        for document in DOCUMENTS[dialect.name]
        if isinstance(document, dict) and document.keys() & {"choices", "meta_info", "error"}
    ]
    for dialect in DIALECTS
}


# --- experts ---------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], dtype: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype=dtype))
    return file.getvalue()


NPY = [npy((2, 3, 2), "uint8"), npy((0, 1, 1), "int32"), npy((4,), "float32")]


@given(data=st.data(), shape=st.sampled_from([
    "(2, 3, 2)", "(10000000000000, 3, 2)", "(-1, 3, 2)", "(2, 3)", "(", "()", "(1e9, 1, 1)", "x",
    "((2,), 3, 2)", "(2, 3, 2), 'more': 1", "(" * 300,
]))  # fmt: skip
@settings(max_examples=MANY)
def test_any_file_of_experts_is_read_or_refused_by_name(data: st.DataObject, shape: str) -> None:
    content = data.draw(st.sampled_from([*NPY, b"PK\x03\x04" + NPY[0], b"\x80\x04.", b""]))
    start = content.find(b"(")
    if data.draw(st.booleans()) and start > 0:
        header = content[:start] + shape.encode() + content[content.find(b")") + 1 :]
        content = header.ljust(len(content))
    if data.draw(st.booleans()):
        content = changed(data.draw, content)
    for read in (read_npy, read_int32):
        try:
            experts = read(content, "vLLM")
        except ProtocolError as exc:
            check_message(exc)
        else:
            assert experts is not None
            assert experts.dtype.kind in "iu"


# --- questions -------------------------------------------------------------------------------

gconfigs = st.builds(
    GenerationHyperparameters,
    max_new_tokens=st.integers(1000, INT32_MAX),
    min_new_tokens=st.integers(0, 1000),
    greedy=st.booleans(),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(1, 2**63 - 1),
    min_p=st.floats(0, 1, exclude_max=True),
    temperature=st.floats(0, allow_infinity=False, allow_nan=False),
    stop_token_ids=st.lists(st.integers(0, INT32_MAX), max_size=3),
    stop=st.lists(st.text(st.characters(codec="utf-8"), max_size=4), max_size=3),
    ignore_eos=st.booleans(),
    skip_special_tokens=st.booleans(),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    lora_name=st.text(st.characters(codec="utf-8"), max_size=4),
)
segments = st.builds(
    SegmentRequest,
    request_id=st.text(max_size=4) | st.just("r-1"),
    token_ids=st.lists(st.integers(0, INT32_MAX), max_size=40).map(
        lambda ids: ModelRequest(ids).input_ids
    ),
    max_new_tokens=st.integers(-1, INT32_MAX),
    min_new_tokens=st.integers(-1, INT32_MAX) | st.just(0),
    gconfig=gconfigs,
    model=st.text(max_size=4),
    seed=st.none() | st.integers(0, 2**63 - 1),
    messages=st.just(())
    | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), anything), max_size=2).map(
        tuple
    ),
)
infos = st.builds(
    ServerInfo,
    model=st.none() | st.text(st.characters(codec="utf-8"), max_size=4),
    vocab_size=st.none() | st.integers(1, INT32_MAX),
    token_in_token_out=st.booleans(),
)


def check_question(ask: Callable[[], Any]) -> list[HttpRequest]:
    """Requests that a server can read, or one error of ours."""
    try:
        asked = ask()
    except (InvalidRequest, ConfigError) as exc:
        check_message(exc)
        return []
    requests = [asked] if isinstance(asked, HttpRequest) else list(asked or ())
    for request in requests:
        assert request.path.startswith("/")
        assert request.path.isascii()
        assert request.path.isprintable()
        assert request.body == b"" or isinstance(json.loads(request.body), dict)
        assert all(value.isprintable() for pair in request.headers for value in pair)
    return requests


@every_dialect
@settings(max_examples=MANY)
@given(segment=segments, info=infos, stream=st.booleans())
def test_any_question_is_json_or_is_not_asked(
    dialect: Dialect, segment: SegmentRequest, info: ServerInfo, stream: bool
) -> None:
    requests = check_question(lambda: dialect.generate(segment, info, stream=stream))
    if not requests or segment.messages:
        return
    question = json.loads(requests[0].body)
    (sent,) = (question[key] for key in ("prompt", "token_ids", "input_ids") if key in question)
    assert sent == segment.token_ids.tolist()
    sampling, gconfig = question.get("sampling_params", question), segment.gconfig
    assert sampling["temperature"] == (0 if gconfig.greedy else gconfig.temperature)
    for name in ("top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
                 "ignore_eos", "skip_special_tokens"):  # fmt: skip
        assert sampling[name] == getattr(gconfig, name)
    assert sampling["stop_token_ids"] == list(gconfig.stop_token_ids)
    assert sampling.get("stop", []) == list(gconfig.stop)
    assert {sampling.get("seed"), sampling.get("sampling_seed")} >= {segment.seed}


words = st.text(max_size=5) | st.sampled_from(["\ud800", "a", "/x", "é", "a&b=c d", "a\r\nb"])
options = st.dictionaries(st.text(max_size=3), anything, max_size=2)


@every_dialect
@given(word=words, other=words, version=st.integers(0, INT32_MAX), options=options,
       mode=st.sampled_from(get_args(PauseMode)) | words)  # fmt: skip
def test_any_command_is_json_or_is_not_sent(
    dialect: Dialect, word: str, other: str, version: int, options: dict[str, Any], mode: Any
) -> None:
    place = GroupPlace(master_address=word, master_port=1, rank_offset=1, world_size=2,
                       group_name=other, options=options)  # fmt: skip
    tensor = TensorSpec(word, other, (1, version))
    for ask in (
        lambda: dialect.pause(mode),
        lambda: dialect.abort(word, INFO),
        lambda: dialect.load_weights(word, version),
        lambda: dialect.label_weights(version),
        lambda: dialect.init_group(place),
        lambda: dialect.receive([tensor], other, last=True),
        lambda: dialect.end_update(version),
        lambda: dialect.load_adapter(word, other),
        lambda: dialect.unload_adapter(word),
        lambda: dialect.wake(dialect.memory_tags[0]),
    ):
        check_question(ask)


@given(ids=anything)
def test_any_ids_are_a_prompt_or_an_invalid_request(ids: Any) -> None:
    try:
        request = ModelRequest(ids)
    except InvalidRequest as exc:
        check_message(exc)
    else:
        assert request.input_ids.dtype == np.int32
        assert request.input_ids.ndim == 1
