"""The SGLang dialect, on every exchange that was recorded from a real SGLang 0.5.23."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from arealtrio.errors import (
    ArealTrioError,
    ConfigError,
    InvalidRequest,
    ProtocolError,
    RequestRejected,
    ServerError,
)
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse
from arealtrio.wire.dialect import Dialect, SegmentRequest, ServerInfo, ServerLoad, VersionSpan
from arealtrio.wire.sglang import SglangDialect

from ..golden import exchange

GOLDEN = "sglang-0.5.23"
DIALECT: Dialect = SglangDialect()
INFO = ServerInfo(
    model="tiny",
    max_model_len=4096,
    max_concurrency=8,
    token_in_token_out=True,
    logprobs_tempered=True,
    tells_experts=False,
)


def recorded(name: str) -> HttpResponse:
    return exchange.answer(GOLDEN, name)


# --- every recording, by what it is to this dialect -------------------------------------------

GENERATED = ["generate.json", "greedy_t1.json", "greedy_t2.json", "greedy_t2_after_bad.json"]

CONTROL_DONE = [
    "abort_request.json",
    "abort_request_all.json",
    "continue_generation_abort.json",
    "continue_generation_in_place.json",
    "continue_generation_retract.json",
    "pause_generation_abort.json",
    "pause_generation_in_place.json",
    "pause_generation_retract.json",
    "update_weights_from_disk.json",
    "update_weights_while_paused_abort.json",
    "update_weights_while_paused_in_place.json",
    "update_weights_while_paused_retract.json",
]

CONTROL_FAILED: dict[str, tuple[type[ArealTrioError], str]] = {  # file -> (class, in its message)
    "err_update_weights_bad.json": (RequestRejected, "Failed to get weights iterator"),
    "flush_cache.json": (ProtocolError, "JSON"),  # a sentence; never asked for, the update flushes
}

GENERATE_FAILED: dict[str, tuple[type[ArealTrioError], str]] = {
    "err_bad_temp.json": (RequestRejected, "temperature must be a non-negative"),
    "err_no_input.json": (RequestRejected, "input_ids or input_embeds"),
    "err_too_long.json": (RequestRejected, "longer than the model's context length"),
    # Tokens without logprobs, which were not asked for, are of no use to a trainer:
    "ignore_eos.json": (ProtocolError, "no logprobs"),
    "stop_token.json": (ProtocolError, "no logprobs"),
    "tps1.json": (ProtocolError, "no logprobs"),
    # What this dialect never asks for, as an answer to what it does ask for:
    "chat.json": (ProtocolError, "meta_info"),
    "completions.json": (ProtocolError, "meta_info"),
    "generate_stream.txt": (ProtocolError, "JSON"),
    "routes.txt": (ProtocolError, "JSON"),
    # Recordings that were cut short, so that their lists no longer agree:
    "spans_in_place.json": (ProtocolError, "those of others"),
    "spans_retract.json": (ProtocolError, "those of others"),
}

HEALTHY = ["health.json", "health2.json", "health_generate.json"]
LABELS = ["get_model_info.json", "model_info.json"]
OTHERS = ["metrics.prom", "models.json", "server_info.json"]


def test_every_recording_is_tested() -> None:
    tested = [
        *GENERATED,
        *CONTROL_DONE,
        *CONTROL_FAILED,
        *GENERATE_FAILED,
        *HEALTHY,
        *LABELS,
        *OTHERS,
    ]
    assert sorted(tested) == sorted(exchange.names(GOLDEN))


@pytest.mark.parametrize("name", GENERATED)
def test_tokens_logprobs_and_versions(name: str) -> None:
    segment = DIALECT.parse_generate(recorded(name), INFO)
    body = exchange.body_of(GOLDEN, name)
    assert segment.token_ids.tolist() == body["output_ids"]
    expected = [pair[0] for pair in body["meta_info"]["output_token_logprobs"]]
    np.testing.assert_array_equal(segment.logprobs, np.array(expected, dtype=np.float32))
    assert segment.token_ids.dtype == np.int32
    assert segment.logprobs.dtype == np.float32
    assert segment.stop_reason == "length"
    assert segment.versions == (VersionSpan(None, 0, 8),)  # "default" and "v2" are not ours
    assert segment.message == ""


@pytest.mark.parametrize("name", CONTROL_DONE)
def test_a_command_that_was_done_says_nothing(name: str) -> None:
    DIALECT.parse_control(recorded(name))
    assert recorded(name).status == 200


@pytest.mark.parametrize("name", CONTROL_FAILED)
def test_a_command_that_failed_says_why(name: str) -> None:
    expected, reason = CONTROL_FAILED[name]
    with pytest.raises(expected) as caught:
        DIALECT.parse_control(recorded(name))
    assert type(caught.value) is expected
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", GENERATE_FAILED)
def test_what_is_no_generation_is_refused_by_class(name: str) -> None:
    expected, reason = GENERATE_FAILED[name]
    with pytest.raises(expected) as caught:
        DIALECT.parse_generate(recorded(name), INFO)
    assert type(caught.value) is expected
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name: str) -> None:
    DIALECT.parse_health(recorded(name))
    assert recorded(name).status == 200


def test_not_healthy() -> None:
    with pytest.raises(ServerError, match="503"):
        DIALECT.parse_health(HttpResponse(503, {}, b""))


@pytest.mark.parametrize("name", LABELS)
def test_the_label_of_a_server_that_nobody_updated(name: str) -> None:
    assert DIALECT.parse_weight_version(recorded(name)) is None


def test_a_label_of_ours() -> None:
    answer = HttpResponse(200, {}, b'{"weight_version":"7"}')
    assert DIALECT.parse_weight_version(answer) == 7


def test_load() -> None:
    load = DIALECT.parse_load(recorded("metrics.prom"))
    assert load == ServerLoad(running=0, waiting=0, requests_finished=24)


def test_load_before_the_first_request_is_done() -> None:
    page = b"sglang:num_running_reqs{} 2.0\nsglang:num_queue_reqs{} 1.0\n"
    load = DIALECT.parse_load(HttpResponse(200, {}, page))
    assert load == ServerLoad(running=2, waiting=1, requests_finished=0)


def test_load_says_how_full_the_cache_is_and_who_had_to_leave_it() -> None:
    page = (
        b"sglang:num_running_reqs{} 2.0\nsglang:num_queue_reqs{} 1.0\n"
        b'sglang:token_usage{tp="0"} 0.5\nsglang:token_usage{tp="1"} 0.96\n'
        b"sglang:num_retracted_reqs{} 3.0\n"
    )
    load = DIALECT.parse_load(HttpResponse(200, {}, page))
    assert load == ServerLoad(
        running=2, waiting=1, requests_finished=0, preempted=3, kv_cache_usage=0.96
    )


def test_discovery() -> None:
    paths = [(question.method, question.path) for question in DIALECT.discover()]
    assert paths == [("GET", "/v1/models"), ("GET", "/server_info"), ("GET", "/model_info")]
    answers = [recorded(n) for n in ("models.json", "server_info.json", "model_info.json")]
    assert DIALECT.parse_discover(answers) == INFO


NOT_THERE = HttpResponse(404, {"content-type": "application/json"}, b'{"detail":"Not Found"}')


def test_discovery_of_a_server_that_says_nothing() -> None:
    info = DIALECT.parse_discover([NOT_THERE] * 3)
    assert info == ServerInfo(token_in_token_out=True, logprobs_tempered=True)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"max_running_requests": 9}, 9),
        ({"max_running_requests": None}, None),
        ({"max_running_requests": 99, "internal_states": [{}]}, 99),
        (
            {
                "max_running_requests": 99,
                "internal_states": [{"effective_max_running_requests_per_dp": 4}] * 3,
            },
            12,
        ),
    ],
)
def test_concurrency_is_what_the_schedulers_settled_on(
    info: dict[str, Any], expected: int | None
) -> None:
    answers = [NOT_THERE, HttpResponse(200, {}, json.dumps(info).encode()), NOT_THERE]
    assert DIALECT.parse_discover(answers).max_concurrency == expected


@pytest.mark.parametrize("index", range(3))
def test_discovery_of_a_server_that_fails_raises(index: int) -> None:
    answers = [NOT_THERE, NOT_THERE, NOT_THERE]
    answers[index] = HttpResponse(500, {}, b"")
    with pytest.raises(ServerError):
        DIALECT.parse_discover(answers)


# --- what is asked -----------------------------------------------------------------------------


def segment(gconfig: GenerationHyperparameters | None = None, **changes: Any) -> SegmentRequest:
    fields: dict[str, Any] = {
        "request_id": "my-rid-1",
        "token_ids": np.array([300, 301, 302, 303, 304], dtype=np.int32),
        "max_new_tokens": 6,
        "gconfig": gconfig or GenerationHyperparameters(),
    }
    return SegmentRequest(**(fields | changes))


def asked(request: HttpRequest) -> dict[str, Any]:
    assert request.method == "POST"
    body = json.loads(request.body)
    assert isinstance(body, dict)
    return body


def test_every_option() -> None:
    gconfig = GenerationHyperparameters(
        max_new_tokens=99,
        min_new_tokens=9,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        temperature=0.7,
        stop_token_ids=(2, 7),
        stop=("zzz",),
        ignore_eos=True,
        skip_special_tokens=False,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        repetition_penalty=1.05,
        lora_name="math",
    )
    request = DIALECT.generate(segment(gconfig, min_new_tokens=2, seed=11, model="math-v3"), INFO)
    assert request.path == "/generate"
    assert asked(request) == {
        "rid": "my-rid-1",
        "input_ids": [300, 301, 302, 303, 304],
        "return_logprob": True,
        "stream": False,
        "lora_path": "math-v3",
        "sampling_params": {
            "max_new_tokens": 6,
            "min_new_tokens": 2,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.05,
            "frequency_penalty": 0.1,
            "presence_penalty": -0.1,
            "repetition_penalty": 1.05,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stop_token_ids": [2, 7],
            "stop": ["zzz"],
            "sampling_seed": 11,
        },
    }


def test_what_is_off_is_sent_too() -> None:
    sampling = asked(DIALECT.generate(segment(), INFO))["sampling_params"]
    assert sampling["temperature"] == 1.0
    assert sampling["top_k"] == -1
    assert sampling["repetition_penalty"] == 1.0
    assert {"stop", "sampling_seed"}.isdisjoint(sampling)


def test_greedy_is_temperature_0() -> None:
    greedy = GenerationHyperparameters(greedy=True)
    sampling = asked(DIALECT.generate(segment(greedy), INFO))["sampling_params"]
    assert sampling["temperature"] == 0


def test_the_rid_is_the_id_that_the_server_answers_with() -> None:
    took = exchange.question(GOLDEN, "ignore_eos.json")["json"]["rid"]
    assert exchange.body_of(GOLDEN, "ignore_eos.json")["meta_info"]["id"] == took
    assert asked(DIALECT.generate(segment(), INFO))["rid"] == took
    assert asked(DIALECT.abort(took, INFO)) == {"rid": took}


def test_an_id_that_would_end_the_server_is_refused() -> None:
    info = ServerInfo(vocab_size=304)
    with pytest.raises(InvalidRequest, match="304"):
        DIALECT.generate(segment(), info)
    DIALECT.generate(segment(), ServerInfo(vocab_size=305))


def test_abort_is_the_recorded_question() -> None:
    took = exchange.question(GOLDEN, "abort_request.json")
    request = DIALECT.abort("in_place-0", INFO)
    assert (request.path, asked(request)) == (took["path"], took["json"])


@pytest.mark.parametrize(
    ("mode", "sent"),
    [("abort", "abort"), ("retract", "retract"), ("in_place", "in_place"), ("keep", "retract")],
)
def test_pause_and_resume_are_the_recorded_questions(mode: Any, sent: str) -> None:
    took = exchange.question(GOLDEN, f"pause_generation_{sent}.json")
    request = DIALECT.pause(mode)
    assert (request.path, asked(request)) == (took["path"], took["json"])
    took = exchange.question(GOLDEN, f"continue_generation_{sent}.json")
    request = DIALECT.resume()
    assert (request.path, asked(request)) == (took["path"], took["json"])


def test_a_pause_mode_of_another_dialect_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="retract"):
        DIALECT.pause("wait")


def test_load_weights_is_what_loaded_real_weights() -> None:
    took = exchange.question(GOLDEN, "update_weights_while_paused_retract.json")
    (request,) = DIALECT.load_weights("models/tiny-1", 5)
    assert (request.path, asked(request)) == (took["path"], took["json"] | {"weight_version": "5"})


def test_the_label_alone_aborts_nothing() -> None:
    request = DIALECT.label_weights(5)
    assert request.path == "/update_weight_version"
    assert asked(request) == {"new_version": "5", "abort_all_requests": False}


def test_the_plain_questions() -> None:
    assert DIALECT.health() == HttpRequest("GET", "/health")
    assert DIALECT.load() == HttpRequest("GET", "/metrics")
    assert DIALECT.weight_version() == HttpRequest("GET", "/model_info")


# --- answers that were not recorded ------------------------------------------------------------


def edited(edit: Callable[[dict[str, Any]], object]) -> HttpResponse:
    body = exchange.body_of(GOLDEN, "generate.json")
    edit(body)
    return HttpResponse(200, {"content-type": "application/json"}, json.dumps(body).encode())


def finished(**finish_reason: Any) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["meta_info"].update(finish_reason=finish_reason)


def test_spans_of_our_labels() -> None:
    spans = [{"version": "3", "start": 0, "end": 5}, {"version": "4", "start": 5, "end": 8}]
    answer = edited(lambda body: body["meta_info"].update(weight_versions=spans))
    expected = (VersionSpan(3, 0, 5), VersionSpan(4, 5, 8))
    assert DIALECT.parse_generate(answer, INFO).versions == expected


def test_a_last_label_alone_says_nothing_about_the_tokens() -> None:
    answer = edited(lambda body: body["meta_info"].pop("weight_versions"))
    assert DIALECT.parse_generate(answer, INFO).versions is None


@pytest.mark.parametrize("matched", [173, [173, 2], "stop", None])
def test_a_stop_of_any_kind(matched: Any) -> None:
    answer = edited(finished(type="stop", matched=matched))
    assert DIALECT.parse_generate(answer, INFO).stop_reason == "stop"


def test_an_abort_keeps_its_tokens_and_its_message() -> None:
    answer = edited(finished(type="abort", message="Aborted", status_code=None, err_type=None))
    segment = DIALECT.parse_generate(answer, INFO)
    assert (segment.stop_reason, segment.message) == ("abort", "Aborted")
    assert len(segment.token_ids) == len(segment.logprobs) == 8


def test_an_abort_before_prefill_has_no_tokens() -> None:
    answer = edited(finished(type="abort", message="Abort before prefill, whatever follows"))
    segment = DIALECT.parse_generate(answer, INFO)
    assert len(segment.token_ids) == len(segment.logprobs) == 0
    assert segment.versions == ()


@pytest.mark.parametrize("ids", [[], None])
def test_an_abort_in_the_queue_has_no_tokens(ids: Any) -> None:
    def edit(body: dict[str, Any]) -> None:
        finished(type="abort", message="Aborted")(body)
        body["output_ids"] = ids
        del body["meta_info"]["output_token_logprobs"]

    segment = DIALECT.parse_generate(edited(edit), INFO)
    assert (segment.stop_reason, len(segment.token_ids), segment.versions) == ("abort", 0, ())


def test_logits_that_were_no_numbers_are_a_failure_of_the_server() -> None:
    with pytest.raises(ServerError, match="not numbers"):
        DIALECT.parse_generate(edited(finished(type="stop", matched="NaN happened")), INFO)


def test_an_answer_without_output_ids_has_them_beside_the_logprobs() -> None:
    segment = DIALECT.parse_generate(edited(lambda body: body.pop("output_ids")), INFO)
    assert segment.token_ids.tolist() == exchange.body_of(GOLDEN, "generate.json")["output_ids"]


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "an id too many": lambda b: b["output_ids"].append(1),
    "another id": lambda b: b["output_ids"].__setitem__(0, 1),
    "a logprob too many": lambda b: b["meta_info"]["output_token_logprobs"].append([-1.0, 1, None]),
    "a logprob that is null": lambda b: b["meta_info"]["output_token_logprobs"][0].__setitem__(
        0, None
    ),
    "no logprobs": lambda b: b["meta_info"].pop("output_token_logprobs"),
    "no meta_info": lambda b: b.pop("meta_info"),
    "no finish reason": lambda b: b["meta_info"].update(finish_reason=None),
    "an unknown finish reason": finished(type="error"),
    "a finish reason that is text": lambda b: b["meta_info"].update(finish_reason="stop"),
    "spans that do not cover the tokens": lambda b: b["meta_info"].update(
        weight_versions=[{"version": "1", "start": 0, "end": 7}]
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_answer_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        DIALECT.parse_generate(edited(BROKEN[what]), INFO)


def test_success_false_is_a_failure() -> None:
    answer = HttpResponse(200, {}, b'{"success":false,"message":"cache not flushed"}')
    with pytest.raises(ServerError, match="cache not flushed"):
        DIALECT.parse_control(answer)
