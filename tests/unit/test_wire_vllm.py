"""The vLLM dialect, on every exchange that was recorded from a real vLLM 0.32.0."""

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
from arealtrio.wire.dialect import (
    Dialect,
    SegmentRequest,
    SegmentResponse,
    ServerInfo,
    ServerLoad,
    VersionSpan,
)
from arealtrio.wire.vllm import VllmDialect

from ..golden import exchange

GOLDEN = "vllm-0.32.0"
DIALECT: Dialect = VllmDialect()
COMPLETIONS = ServerInfo(model="tiny", max_model_len=16384, max_concurrency=8)
TOKENS = ServerInfo(model="tiny", max_model_len=16384, max_concurrency=8, token_in_token_out=True)


def recorded(name: str) -> HttpResponse:
    return exchange.answer(GOLDEN, name)


def completed(name: str) -> SegmentResponse:
    return DIALECT.parse_generate(recorded(name), COMPLETIONS)


def generated(name: str) -> SegmentResponse:
    return DIALECT.parse_generate(recorded(name), TOKENS)


# --- every recording, by what it is to this dialect -------------------------------------------

COMPLETION_TOKENS = {  # file -> (stop reason, number of tokens)
    "completion_aborted.json": ("abort", 365),
    "completion_aborted_before_first.json": ("abort", 0),
    "completion_every_option.json": ("length", 6),
    "completion_for_stop.json": ("length", 8),
    "completion_logit_bias_eos.json": ("stop", 1),
    "completion_priority_etc.json": ("length", 2),
    "completion_prompt_logprobs.json": ("length", 2),
    "completion_sampled_rl.json": ("length", 8),
    "completion_stop_token_ids.json": ("stop", 4),
    "completion_stop_token_ids_incl.json": ("stop", 4),
    "completion_token_ids_greedy.json": ("length", 8),
    "completion_token_strings_only.json": ("length", 3),
    "reload_greedy_after_bad_method.json": ("length", 8),
    "reload_greedy_after_ext_missing_file.json": ("length", 8),
    "reload_greedy_after_keep_reload_tiny2.json": ("length", 8),
    "reload_greedy_after_update_no_start.json": ("length", 8),
    "reload_greedy_back_tiny1.json": ("length", 8),
    "reload_greedy_ext_tiny2.json": ("length", 8),
    "reload_greedy_first.json": ("length", 8),
    "reload_greedy_wt_before.json": ("length", 8),
    "reload_greedy_wt_tiny3.json": ("length", 8),
}

# Tokens without logprobs: of no use to a trainer, so refused. (These were not asked for.)
COMPLETIONS_WITHOUT_LOGPROBS = {
    "completion_after_wake.json",
    "completion_for_stopstr.json",
    "completion_logit_bias_eos_ignore_eos.json",
    "completion_min_tokens.json",
    "completion_stop_string.json",
    "err_prompt_plus_max_tokens.json",
    "err_unknown_field.json",
    "rc_completion.json",
    "request_id_body.json",
    "x_request_id.json",
}

TOKEN_ROUTE: dict[
    str, tuple[str, int, list[tuple[int | None, int, int]]]
] = {  # file -> (stop reason, number of tokens, spans)
    "generate_tito.json": ("length", 4, [(None, 0, 4)]),
    "generate_tito_aborted.json": ("abort", 347, [(1, 0, 347)]),
    "generate_tito_aborted_before_first.json": ("abort", 0, []),
    "generate_tito_both_ids.json": ("length", 4, [(None, 0, 4)]),
    "generate_tito_every_option.json": ("length", 6, [(None, 0, 6)]),
    "generate_tito_logprobs_0.json": ("length", 4, [(None, 0, 4)]),
    "generate_tito_prompt_plus_max_tokens.json": ("length", 4, [(None, 0, 4)]),
    "generate_tito_request_id_body.json": ("length", 4, [(None, 0, 4)]),
    "generate_tito_stop_string.json": ("stop", 2, [(None, 0, 2)]),
    "generate_tito_stop_token.json": ("stop", 1, [(None, 0, 1)]),
    "generate_tito_unknown_sampling_param.json": ("length", 4, [(None, 0, 4)]),
    "generate_tito_version_1.json": ("length", 4, [(1, 0, 4)]),
    "generate_tito_x_request_id.json": ("length", 4, [(None, 0, 4)]),
    "pause_abort_tito.json": ("abort", 265, [(2, 0, 265)]),
    "update_tito.json": ("length", 420, [(2, 0, 132), (3, 132, 420)]),
}

CONTROL_DONE = {
    "abort_requests_all.json",
    "abort_requests_by_id.json",
    "collective_rpc_reload_weights.json",
    "collective_rpc_reload_weights_back.json",
    "completion_aborted_request.json",
    "err_pause_twice_1.json",  # pausing twice is harmless, in spite of the file's name
    "err_pause_twice_2.json",
    "err_resume_not_paused.json",
    "err_wt_start.json",
    "ext_load_tiny2.json",
    "ext_rl_info.json",
    "generate_tito_abort.json",
    "generate_tito_aborted_dev_request.json",
    "generate_tito_aborted_request.json",
    "ku_finish.json",
    "ku_pause.json",
    "ku_reset.json",
    "ku_resume.json",
    "ku_start.json",
    "ku_update.json",
    "pause_abort_idle.json",
    "pause_abort_inflight.json",
    "pause_keep_inflight.json",
    "pause_wait_inflight.json",
    "rc_finish.json",
    "rc_good.json",
    "rc_pause.json",
    "rc_resume.json",
    "rc_start.json",
    "rc_start2.json",
    "reload_while_kept.json",
    "reset_prefix_cache.json",
    "reset_prefix_cache2.json",
    "reset_prefix_cache_running_while_kept.json",
    "reset_prefix_cache_while_kept.json",
    "resume.json",
    "sleep_cpu.json",
    "update_1_pause.json",
    "update_2_reload.json",
    "update_3_reset.json",
    "update_4_label.json",
    "update_5_resume.json",
    "update_weight_version.json",
    "wake_up_cpu.json",
    "wt_finish.json",
    "wt_init.json",
    "wt_pause.json",
    "wt_reset_prefix.json",
    "wt_resume.json",
    "wt_start.json",
    "wt_update.json",
}

CONTROL_FAILED: dict[str, tuple[type[ArealTrioError], str]] = {  # file -> (class, in its message)
    "err_collective_rpc_bad_method.json": (ServerError, "nope_method"),
    "err_collective_rpc_bad_path.json": (ServerError, "Repo id must use alphanumeric"),
    "err_collective_rpc_no_method.json": (RequestRejected, "Missing 'method'"),
    "err_ext_missing_file.json": (ServerError, "collective_rpc"),
    "err_ext_missing_file_safe.json": (ServerError, "no such file"),
    "err_finish_no_start.json": (ServerError, "without a matching start_weight_update"),
    "err_pause_bad_mode.json": (RequestRejected, "'abort', 'wait' or 'keep'"),
    "err_update_weights_no_start.json": (ServerError, "must be called before update_weights"),
    "err_wt_update_missing.json": (ServerError, "No such file or directory"),
    "rc_bad.json": (ServerError, "No such file or directory"),
}

GENERATE_FAILED: dict[str, tuple[type[ArealTrioError], str]] = {
    "completion_after_failed_wt.json": (ServerError, "EngineCore encountered an issue"),
    "err_404.json": (RequestRejected, "Not Found"),
    "err_405.json": (RequestRejected, "Method Not Allowed"),
    "err_bad_temperature.json": (RequestRejected, "temperature must be non-negative"),
    "err_empty_prompt.json": (RequestRejected, "at least one prompt"),
    "err_max_tokens_0.json": (RequestRejected, "max_tokens must be at least 1"),
    "err_missing_prompt.json": (RequestRejected, "prompt_embeds must be provided"),
    "err_negative_token.json": (RequestRejected, "greater than or equal to 0"),
    "err_not_json.json": (RequestRejected, "JSON decode error"),
    "err_prompt_too_long.json": (RequestRejected, "maximum context length is 1024"),
    "err_tito_empty.json": (RequestRejected, "Field required"),
    "err_tito_out_of_vocab.json": (RequestRejected, "out of vocabulary"),
    "err_tito_prompt_too_long.json": (RequestRejected, "longer than the maximum model length"),
    "err_tito_stop_without_detokenize.json": (RequestRejected, "detokenize"),
    "err_tito_unknown_model.json": (RequestRejected, "does not exist"),
    "err_token_id_out_of_vocab.json": (RequestRejected, "out of vocabulary"),
    "err_too_many_logprobs.json": (RequestRejected, "greater than max allowed"),
    "err_unknown_model.json": (RequestRejected, "does not exist"),
    "err_wrong_type.json": (RequestRejected, "should be a valid integer"),
    # What this dialect never asks for, as an answer to what it does ask for:
    "chat_logprobs.json": (ProtocolError, "token_id"),
    "chat_plain.json": (ProtocolError, "logprobs"),
    "completion_echo_logprobs.json": (ProtocolError, ""),
    "completion_multi_prompt.json": (ProtocolError, "1 choice"),
    "completion_n3.json": (ProtocolError, "1 choice"),
    "detokenize.json": (ProtocolError, "choices"),
    "generate_tito_no_logprobs.json": (ProtocolError, "logprobs"),
    "generate_tito_stream.txt": (ProtocolError, "JSON"),
    "get_world_size.json": (ProtocolError, "choices"),
    "is_paused_0.json": (ProtocolError, "choices"),
    "is_paused_1.json": (ProtocolError, "choices"),
    "is_paused_2.json": (ProtocolError, "choices"),
    "is_paused_abort.json": (ProtocolError, "choices"),
    "is_paused_keep.json": (ProtocolError, "choices"),
    "is_paused_sleeping.json": (ProtocolError, "choices"),
    "is_paused_wait.json": (ProtocolError, "choices"),
    "is_sleeping_0.json": (ProtocolError, "choices"),
    "is_sleeping_1.json": (ProtocolError, "choices"),
    "is_sleeping_2.json": (ProtocolError, "choices"),
    "load.json": (ProtocolError, "choices"),
    "pause_and_abort_log.txt": (ProtocolError, "JSON"),
    "responses_api.json": (ProtocolError, "choices"),
    "routes.txt": (ProtocolError, "JSON"),
    "stream_chat.json": (ProtocolError, "JSON"),  # a stream; its lines were saved apart
    "stream_completion.json": (ProtocolError, "JSON"),
    "tokenize.json": (ProtocolError, "choices"),
    "version.json": (ProtocolError, "choices"),
    "weight_checker_0.json": (ProtocolError, "choices"),
    "weight_checker_1.json": (ProtocolError, "choices"),
    # Recordings that were cut short, so that their lists no longer agree:
    "keep_update_cmpl.json": (ProtocolError, ""),
    "keep_update_tito.json": (ProtocolError, ""),
    "pause_abort_results.json": (ProtocolError, "choices"),
    "pause_keep_results.json": (ProtocolError, "choices"),
    "pause_wait_results.json": (ProtocolError, "choices"),
    "worker_sigkill.json": (ProtocolError, "choices"),
}

HEALTHY = {
    "health.json",
    "health_after_bad_path.json",
    "health_sleeping.json",
    "health_while_paused_abort.json",
    "health_while_paused_keep.json",
    "health_while_paused_wait.json",
    "ping.json",
}

LOADS = {
    "metrics_busy.prom": ServerLoad(
        running=8, waiting=4, requests_finished=0, kv_cache_usage=0.00782013685239491
    ),
    "metrics_idle.prom": ServerLoad(running=0, waiting=0, requests_finished=0),
}

LABELS = {
    "weight_info_0.json": None,
    "weight_info_1.json": 2,
    "wt_weight_info.json": None,  # "v3": not a label of ours
}

DISCOVERY = {"models.json", "server_info.json", "generate_tito_probe.json"}


def test_every_recording_is_tested() -> None:
    tested = [
        *COMPLETION_TOKENS,
        *COMPLETIONS_WITHOUT_LOGPROBS,
        *TOKEN_ROUTE,
        *CONTROL_DONE,
        *CONTROL_FAILED,
        *GENERATE_FAILED,
        *HEALTHY,
        *LOADS,
        *LABELS,
        *DISCOVERY,
    ]
    assert sorted(tested) == sorted(exchange.names(GOLDEN))


@pytest.mark.parametrize("name", sorted(COMPLETION_TOKENS))
def test_a_completion_gives_tokens_and_logprobs_without_versions(name: str) -> None:
    stop_reason, count = COMPLETION_TOKENS[name]
    segment = completed(name)
    choice = exchange.body_of(GOLDEN, name)["choices"][0]
    ids = choice["token_ids"]
    if ids is None:
        ids = [int(token.partition(":")[2]) for token in choice["logprobs"]["tokens"]]
    assert (segment.stop_reason, len(segment.token_ids)) == (stop_reason, count)
    assert segment.token_ids.tolist() == ids
    assert segment.token_ids.dtype == np.int32
    assert segment.logprobs.dtype == np.float32
    expected = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32)
    np.testing.assert_array_equal(segment.logprobs, expected)
    assert segment.versions is None


@pytest.mark.parametrize("name", sorted(TOKEN_ROUTE))
def test_the_token_route_gives_tokens_logprobs_and_versions(name: str) -> None:
    stop_reason, count, spans = TOKEN_ROUTE[name]
    segment = generated(name)
    choice = exchange.body_of(GOLDEN, name)["choices"][0]
    assert (segment.stop_reason, len(segment.token_ids)) == (stop_reason, count)
    assert segment.token_ids.tolist() == choice["token_ids"]
    expected = [item["logprob"] for item in choice["logprobs"]["content"]]
    np.testing.assert_array_equal(segment.logprobs, np.array(expected, dtype=np.float32))
    assert segment.logprobs.dtype == np.float32
    assert segment.versions == tuple(VersionSpan(*span) for span in spans)


@pytest.mark.parametrize("name", sorted(COMPLETIONS_WITHOUT_LOGPROBS))
def test_tokens_without_logprobs_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="logprobs"):
        completed(name)


@pytest.mark.parametrize("name", sorted(CONTROL_DONE))
def test_a_command_that_was_done_says_nothing(name: str) -> None:
    DIALECT.parse_control(recorded(name))
    assert recorded(name).status == 200


@pytest.mark.parametrize("name", sorted(CONTROL_FAILED))
def test_a_command_that_failed_says_why(name: str) -> None:
    expected, reason = CONTROL_FAILED[name]
    with pytest.raises(expected) as caught:
        DIALECT.parse_control(recorded(name))
    assert type(caught.value) is expected
    assert reason in str(caught.value)


@pytest.mark.parametrize("info", [COMPLETIONS, TOKENS], ids=["completions", "tokens"])
@pytest.mark.parametrize("name", sorted(GENERATE_FAILED))
def test_what_is_no_generation_is_refused_by_class(name: str, info: ServerInfo) -> None:
    expected, reason = GENERATE_FAILED[name]
    with pytest.raises(expected) as caught:
        DIALECT.parse_generate(recorded(name), info)
    assert type(caught.value) is expected
    assert reason in str(caught.value)
    if isinstance(caught.value, (RequestRejected, ServerError)):
        assert caught.value.status == recorded(name).status


@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_healthy(name: str) -> None:
    DIALECT.parse_health(recorded(name))
    assert recorded(name).body == b""


def test_not_healthy() -> None:
    with pytest.raises(ServerError, match="503"):
        DIALECT.parse_health(HttpResponse(503, {}, b""))


@pytest.mark.parametrize("name", sorted(LOADS))
def test_load(name: str) -> None:
    assert DIALECT.parse_load(recorded(name)) == LOADS[name]


def test_load_adds_up_the_engines_of_a_data_parallel_server() -> None:
    page = (
        b'vllm:num_requests_running{engine="0"} 3.0\n'
        b'vllm:num_requests_running{engine="1",model_name="a} b\\"c"} 4.0 1700000000000\n'
        b"vllm:num_requests_waiting 1\n"
        b'vllm:num_requests_waiting_by_reason{reason="capacity"} 9.0\n'
        b'vllm:request_success_total{finished_reason="stop"} 5.0\r\n'
        b'vllm:request_success_total{finished_reason="abort"} 1e1\n'
        b'vllm:num_preemptions_total{engine="0"} 2.0\nvllm:num_preemptions_total{engine="1"} 3.0\n'
        b'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.75\n'
    )
    load = DIALECT.parse_load(HttpResponse(200, {}, page.replace(b"\r", b"")))
    assert load == ServerLoad(
        running=7, waiting=1, requests_finished=15, preemptions=5, kv_cache_usage=0.75
    )


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"<html></html>",
        b"vllm:num_requests_running 1\nvllm:num_requests_waiting 1\n",
        b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 1\nvllm:request_success_total 1",
        b"vllm:num_requests_running x\nvllm:num_requests_waiting 1\nvllm:request_success_total 1",
    ],
)
def test_load_without_its_metrics_is_refused(page: bytes) -> None:
    with pytest.raises(ProtocolError, match="metric vllm:"):
        DIALECT.parse_load(HttpResponse(200, {}, page))


@pytest.mark.parametrize("name", sorted(LABELS))
def test_weight_version(name: str) -> None:
    assert DIALECT.parse_weight_version(recorded(name)) == LABELS[name]


def test_when_its_process_started() -> None:
    assert DIALECT.started() == HttpRequest("GET", "/metrics")
    assert DIALECT.parse_started(recorded("metrics_idle.prom")) == 1795407261.69
    assert DIALECT.parse_started(recorded("metrics_busy.prom")) == 1795409225.77
    assert DIALECT.parse_started(HttpResponse(200, {}, b"vllm:num_requests_running 1\n")) is None


SLEEPING = {"is_sleeping_0.json": False, "is_sleeping_1.json": True, "is_sleeping_2.json": False}


@pytest.mark.parametrize("name", sorted(SLEEPING))
def test_whether_it_sleeps(name: str) -> None:
    asked = exchange.question(GOLDEN, name)
    assert DIALECT.sleeping() == HttpRequest(asked["method"], asked["path"])
    assert DIALECT.parse_sleeping(recorded(name)) is SLEEPING[name]


def test_one_without_development_routes_does_not_sleep() -> None:
    assert DIALECT.parse_sleeping(recorded("err_404.json")) is False


# --- discovery ---------------------------------------------------------------------------------

NOT_THERE = HttpResponse(404, {"content-type": "application/json"}, b'{"detail":"Not Found"}')


def test_discovery_asks_without_generating_anything() -> None:
    questions = DIALECT.discover()
    assert [(question.method, question.path) for question in questions] == [
        ("GET", "/v1/models"),
        ("GET", "/server_info?config_format=json"),
        ("GET", "/weight_info"),
        ("GET", "/inference/v1/generate"),
    ]


def test_discovery_of_a_server_with_every_route() -> None:
    answers = [
        recorded("models.json"),
        recorded("server_info.json"),
        recorded("weight_info_1.json"),
        recorded("generate_tito_probe.json"),
    ]
    assert DIALECT.parse_discover(answers) == ServerInfo(
        model="tiny",
        max_model_len=1024,
        max_concurrency=8,
        weight_version=2,
        token_in_token_out=True,
        streams_news=True,
        logprobs_tempered=False,
        tells_experts=False,
    )


def test_discovery_of_a_server_without_dev_mode_and_scale_out() -> None:
    answers = [recorded("models.json"), NOT_THERE, NOT_THERE, NOT_THERE]
    expected = ServerInfo(model="tiny", max_model_len=1024, streams_news=True)
    assert DIALECT.parse_discover(answers) == expected


def test_discovery_of_a_server_whose_configuration_is_text() -> None:
    text = HttpResponse(200, {}, b'{"vllm_config":"model=\'tiny\', max_num_seqs=8"}')
    answers = [recorded("models.json"), text, NOT_THERE, NOT_THERE]
    assert DIALECT.parse_discover(answers).max_concurrency is None


def test_discovery_counts_the_engines_of_one_server() -> None:
    config = {
        "vllm_config": {
            "scheduler_config": {"max_num_seqs": 8},
            "parallel_config": {"data_parallel_size": 16, "data_parallel_size_local": 4},
        }
    }
    answer = HttpResponse(200, {}, json.dumps(config).encode())
    answers = [recorded("models.json"), answer, NOT_THERE, NOT_THERE]
    assert DIALECT.parse_discover(answers).max_concurrency == 32


@pytest.mark.parametrize(
    ("mode", "tempered"), [("raw_logprobs", False), ("processed_logprobs", True)]
)
def test_discovery_knows_what_the_logprobs_are_of(mode: str, tempered: bool) -> None:
    answer = HttpResponse(
        200, {}, b'{"vllm_config":{"model_config":{"logprobs_mode":"%b"}}}' % mode.encode()
    )
    info = DIALECT.parse_discover([recorded("models.json"), answer, NOT_THERE, NOT_THERE])
    assert info.logprobs_tempered is tempered


def test_a_server_that_gives_logits_for_logprobs_is_refused() -> None:
    answer = HttpResponse(
        200, {}, b'{"vllm_config":{"model_config":{"logprobs_mode":"raw_logits"}}}'
    )
    with pytest.raises(ProtocolError, match="--logprobs-mode 'raw_logits'"):
        DIALECT.parse_discover([recorded("models.json"), answer, NOT_THERE, NOT_THERE])


@pytest.mark.parametrize(
    "page",
    [
        HttpResponse(200, {"content-type": "text/html"}, b"<html></html>"),
        HttpResponse(404, {"content-type": "text/html"}, b"<h1>404 Not Found</h1>"),
        HttpResponse(404, {"content-type": "application/json"}, b'{"error":"no such upstream"}'),
        HttpResponse(404, {}, b""),
    ],
)
def test_what_vllm_does_not_say_says_nothing_of_the_token_route(page: HttpResponse) -> None:
    """Taken for a no, it cost a server the report of its versions for as long as it served."""
    answers = [recorded("models.json"), NOT_THERE, NOT_THERE, page]
    with pytest.raises(ProtocolError, match="expected 404 or 405 for a GET of /inference"):
        DIALECT.parse_discover(answers)


@pytest.mark.parametrize("index", range(4))
def test_discovery_of_a_server_that_fails_raises(index: int) -> None:
    answers = [recorded("models.json"), NOT_THERE, NOT_THERE, NOT_THERE]
    answers[index] = HttpResponse(500, {}, b"")
    with pytest.raises(ServerError):
        DIALECT.parse_discover(answers)


def test_discovery_of_a_server_without_a_model_raises() -> None:
    answers = [HttpResponse(200, {}, b'{"data":[]}'), NOT_THERE, NOT_THERE, NOT_THERE]
    with pytest.raises(ProtocolError, match="at least one model"):
        DIALECT.parse_discover(answers)


# --- what is asked -----------------------------------------------------------------------------

EVERY_OPTION = GenerationHyperparameters(
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
)


def segment(gconfig: GenerationHyperparameters | None = None, **changes: Any) -> SegmentRequest:
    fields: dict[str, Any] = {
        "request_id": "r-1",
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


def test_every_option_on_the_token_route_is_one_that_the_server_took() -> None:
    request = DIALECT.generate(
        segment(EVERY_OPTION, min_new_tokens=2, seed=11, model="tiny"), TOKENS
    )
    body = asked(request)
    took = exchange.question(GOLDEN, "generate_tito_every_option.json")["json"]
    sampling = body.pop("sampling_params")
    assert sampling == {k: v for k, v in took.pop("sampling_params").items() if k != "n"} | {
        "detokenize": True
    }
    assert body == took | {"request_id": "r-1"}
    assert request.path == "/inference/v1/generate"
    assert request.headers == (("X-Request-Id", "r-1"),)


def test_every_option_of_a_completion_is_one_that_the_server_took() -> None:
    request = DIALECT.generate(
        segment(EVERY_OPTION, min_new_tokens=2, seed=11, model="tiny"), COMPLETIONS
    )
    took = exchange.question(GOLDEN, "completion_every_option.json")["json"]
    del took["n"], took["stream"]  # 1 and false are the route's own defaults
    assert asked(request) == took | {"request_id": "r-1"}
    assert request.path == "/v1/completions"
    assert request.headers == (("X-Request-Id", "r-1"),)


@pytest.mark.parametrize("info", [COMPLETIONS, TOKENS], ids=["completions", "tokens"])
def test_what_is_off_is_sent_too(info: ServerInfo) -> None:
    """What a request leaves out, vLLM takes from the model's generation_config.json."""
    body = asked(DIALECT.generate(segment(), info))
    sampling = body.get("sampling_params", body)
    assert sampling["temperature"] == 1.0
    assert sampling["top_p"] == 1.0
    assert sampling["top_k"] == -1
    assert sampling["min_p"] == 0.0
    assert sampling["repetition_penalty"] == 1.0
    assert sampling["min_tokens"] == 0
    assert sampling["max_tokens"] == 6
    assert "seed" not in sampling
    assert "stop" not in sampling


def test_text_is_made_only_for_stop_strings() -> None:
    def detokenize(gconfig: GenerationHyperparameters) -> Any:
        body = asked(DIALECT.generate(segment(gconfig), TOKENS))
        return body["sampling_params"]["detokenize"]

    assert detokenize(GenerationHyperparameters()) is False
    assert detokenize(GenerationHyperparameters(stop=("a",))) is True


def test_greedy_is_temperature_0() -> None:
    greedy = GenerationHyperparameters(greedy=True, temperature=0.9)
    assert asked(DIALECT.generate(segment(greedy), COMPLETIONS))["temperature"] == 0


@pytest.mark.parametrize(
    ("top_k", "vocab_size", "sent"),
    [(20, None, 20), (int(1e8), None, -1), (370, 371, 370), (371, 371, -1), (2**40, 371, -1)],
)
def test_top_k_of_the_whole_vocabulary_is_minus_1(
    top_k: int, vocab_size: int | None, sent: int
) -> None:
    info = ServerInfo(model="tiny", vocab_size=vocab_size)
    body = asked(DIALECT.generate(segment(GenerationHyperparameters(top_k=top_k)), info))
    assert body["top_k"] == sent


def test_the_model_is_the_segments_else_the_servers_else_none() -> None:
    assert asked(DIALECT.generate(segment(model="lora-v3"), TOKENS))["model"] == "lora-v3"
    assert asked(DIALECT.generate(segment(), TOKENS))["model"] == "tiny"
    assert "model" not in asked(DIALECT.generate(segment(), ServerInfo()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": np.array([], dtype=np.int32)}, "at least one prompt token"),
        ({"token_ids": np.array([1, 371], dtype=np.int32)}, "371"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 7}, "min_new_tokens"),
        ({"request_id": ""}, "request id"),
        ({"request_id": "a\r\nHost: b"}, "request id"),
        ({"request_id": "ä"}, "request id"),
    ],
)
def test_what_no_server_should_see_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        DIALECT.generate(segment(**changes), ServerInfo(model="tiny", vocab_size=371))


@pytest.mark.parametrize(
    ("name", "info"),
    [("generate_tito_x_request_id.json", TOKENS), ("x_request_id.json", COMPLETIONS)],
)
def test_the_abort_id_is_the_one_that_the_server_made(name: str, info: ServerInfo) -> None:
    ours = exchange.question(GOLDEN, name)["headers"]["X-Request-Id"]
    answer = exchange.body_of(GOLDEN, name)
    theirs = answer.get("request_id") or answer["id"] + "-0"
    assert asked(DIALECT.abort(ours, info)) == {"request_ids": [theirs]}


@pytest.mark.parametrize(
    ("ours", "name", "info"),
    [
        ("ab-1", "generate_tito_aborted_request.json", TOKENS),
        ("ab-4", "completion_aborted_request.json", COMPLETIONS),
    ],
)
def test_abort_is_what_aborted_a_real_request(ours: str, name: str, info: ServerInfo) -> None:
    took = exchange.question(GOLDEN, name)
    request = DIALECT.abort(ours, info)
    assert (request.method, request.path, asked(request)) == (
        took["method"],
        took["path"],
        took["json"],
    )


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
def test_pause(mode: Any) -> None:
    took = exchange.question(GOLDEN, f"pause_{mode}_inflight.json")
    assert DIALECT.pause(mode) == HttpRequest("POST", f"{took['path']}?mode={mode}")


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_mode_of_another_dialect_is_a_mistake(mode: Any) -> None:
    with pytest.raises(ConfigError, match="keep, abort, wait"):
        DIALECT.pause(mode)


def test_load_weights_is_what_loaded_real_weights() -> None:
    requests = DIALECT.load_weights("models/tiny-3", 3)
    # Recorded with the label last. It is of a paused server, which makes no token in between.
    names = ["update_4_label.json", "update_2_reload.json", "update_3_reset.json"]
    assert len(requests) == len(names)
    for request, name in zip(requests, names, strict=True):
        took = exchange.question(GOLDEN, name)
        query = "".join(f"?{key}={value}" for key, value in (took["params"] or {}).items())
        assert request.path == took["path"] + query
        assert (json.loads(request.body) if request.body else None) == took["json"]


def test_the_label_alone() -> None:
    took = exchange.question(GOLDEN, "update_weight_version.json")
    request = DIALECT.label_weights(7)
    assert (request.path, asked(request)) == (took["path"], {"new_version": "7"})
    assert set(took["json"]) == {"new_version"}


def test_the_plain_questions() -> None:
    assert DIALECT.resume() == HttpRequest("POST", "/resume")
    assert DIALECT.health() == HttpRequest("GET", "/health")
    assert DIALECT.load() == HttpRequest("GET", "/metrics")
    assert DIALECT.weight_version() == HttpRequest("GET", "/weight_info")


# --- answers that no server should give --------------------------------------------------------


def edited(name: str, edit: Callable[[dict[str, Any]], object]) -> HttpResponse:
    body = exchange.body_of(GOLDEN, name)
    edit(body["choices"][0])
    return HttpResponse(200, {"content-type": "application/json"}, json.dumps(body).encode())


def replace_ids(choice: dict[str, Any], tokens: list[str] | None) -> None:
    choice["token_ids"] = None
    choice["logprobs"]["tokens"] = tokens


BROKEN_COMPLETIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an id too many": lambda c: c["token_ids"].append(1),
    "a logprob too many": lambda c: c["logprobs"]["token_logprobs"].append(-1.0),
    "a logprob that is null": lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None),
    "a logprob that is text": lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, "-1.0"),
    "a logprob that is not finite": lambda c: c["logprobs"]["token_logprobs"].__setitem__(
        0, float("-inf")
    ),
    "an id that is a float": lambda c: c["token_ids"].__setitem__(0, 1.0),
    "an id that is negative": lambda c: c["token_ids"].__setitem__(0, -1),
    "an id above int32": lambda c: c["token_ids"].__setitem__(0, 2**31),
    "no ids but text": lambda c: replace_ids(c, ["a"] * 8),
    "no ids and no text": lambda c: replace_ids(c, None),
    "no logprobs": lambda c: c.__setitem__("logprobs", None),
    "logprobs of another shape": lambda c: c.__setitem__("logprobs", [1, 2]),
    "no finish reason": lambda c: c.__setitem__("finish_reason", None),
    "an unknown finish reason": lambda c: c.__setitem__("finish_reason", "repetition"),
}


@pytest.mark.parametrize("what", BROKEN_COMPLETIONS)
def test_a_broken_completion_is_refused(what: str) -> None:
    answer = edited("completion_sampled_rl.json", BROKEN_COMPLETIONS[what])
    with pytest.raises(ProtocolError, match="expected"):
        DIALECT.parse_generate(answer, COMPLETIONS)


def spans(*edges: tuple[Any, Any, Any]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in edges]


BROKEN_SPANS = {
    "a gap at the start": spans(("1", 1, 4)),
    "a gap": spans(("1", 0, 2), ("2", 3, 4)),
    "an overlap": spans(("1", 0, 3), ("2", 2, 4)),
    "out of order": spans(("2", 2, 4), ("1", 0, 2)),
    "too short": spans(("1", 0, 3)),
    "too long": spans(("1", 0, 5)),
    "backwards": spans(("1", 0, 4), ("2", 4, 3), ("3", 3, 4)),
    "none for some tokens": spans(),
    "no number": spans(("1", 0, "4")),
    "a number as label": spans((1, 0, 4)),
}


@pytest.mark.parametrize("what", BROKEN_SPANS)
def test_spans_that_do_not_cover_the_tokens_are_refused(what: str) -> None:
    answer = edited(
        "generate_tito.json", lambda c: c.__setitem__("weight_versions", BROKEN_SPANS[what])
    )
    with pytest.raises(ProtocolError, match="expected"):
        DIALECT.parse_generate(answer, TOKENS)


def test_an_empty_span_is_no_span() -> None:
    answer = edited(
        "generate_tito.json",
        lambda c: c.__setitem__("weight_versions", spans(("1", 0, 0), ("2", 0, 4), ("3", 4, 4))),
    )
    assert DIALECT.parse_generate(answer, TOKENS).versions == (VersionSpan(2, 0, 4),)


def test_a_server_that_knows_no_label_reports_none() -> None:
    answer = edited("generate_tito.json", lambda c: c.__setitem__("weight_versions", None))
    assert DIALECT.parse_generate(answer, TOKENS).versions is None


@pytest.mark.parametrize(
    ("label", "version"),
    [
        ("0", 0), ("12", 12), (str(2**31 - 1), 2**31 - 1), (str(2**31), None), ("", None),
        ("v1", None), ("01", None), ("-1", None), ("+1", None), (" 1", None), ("1_0", None),
        ("١", None), ("1.0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_only_a_label_of_ours_is_a_version(label: str, version: int | None) -> None:
    answer = HttpResponse(200, {}, json.dumps({"weight_version": label}).encode())
    assert DIALECT.parse_weight_version(answer) == version


def test_logprobs_of_other_tokens_are_refused() -> None:
    answer = edited(
        "generate_tito.json", lambda c: c["logprobs"]["content"][1].__setitem__("token_id", 1)
    )
    with pytest.raises(ProtocolError, match="of others"):
        DIALECT.parse_generate(answer, TOKENS)


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -1])
def test_a_truncated_answer_is_refused(keep: int) -> None:
    whole = recorded("completion_sampled_rl.json").body
    with pytest.raises(ProtocolError, match="expected"):
        DIALECT.parse_generate(HttpResponse(200, {}, whole[:keep]), COMPLETIONS)


def test_html_is_named_and_not_repeated() -> None:
    page = HttpResponse(200, {"content-type": "text/html"}, b"<html>secret</html>")
    with pytest.raises(ProtocolError, match="19 bytes of text/html") as caught:
        DIALECT.parse_generate(page, COMPLETIONS)
    assert "secret" not in str(caught.value)


def test_a_redirect_is_no_answer() -> None:
    with pytest.raises(ProtocolError, match="307"):
        DIALECT.parse_generate(HttpResponse(307, {"location": "/"}, b""), COMPLETIONS)


def test_a_command_answered_by_a_page_was_not_done() -> None:
    page = HttpResponse(200, {"content-type": "text/html"}, b"<html></html>")
    with pytest.raises(ProtocolError, match="text/html"):
        DIALECT.parse_control(page)


def test_success_false_is_a_failure() -> None:
    with pytest.raises(ServerError, match="success: false"):
        DIALECT.parse_control(HttpResponse(200, {}, b'{"success":false}'))
