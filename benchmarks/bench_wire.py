"""What does a real-sized answer cost to read, and a prompt to write, beside what Python would do?

Each question is asked of three readers in one run: the dialect's ``parse_generate`` (all that a
segment is: arrays, stop reason, version spans, checks), and json and orjson to the same two arrays
and no more. Targets: the dialect takes at most 1/6 of json and 1/3 of orjson; ids are written in at
most 1/8 of json.

    pytest benchmarks/bench_wire.py --benchmark-group-by=group

``test_targets`` prints the ratios (``-s``) and fails where one misses its target; it measures in
turn, round after round, so that a busy machine slows all alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from arealtrio._core.logprobs import encode_ids
from arealtrio.types import Float32Array, HttpResponse, Int32Array
from arealtrio.wire.dialect import ServerInfo
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

from .baseline import median_ratio

TOKENS = 4096
RANDOM = np.random.default_rng(0)
IDS: list[int] = RANDOM.integers(0, 150_000, TOKENS).tolist()
# Servers print a float32 with the digits of the float64 that equals it, about 17.
LOGPROBS: list[float] = (-RANDOM.exponential(1.5, TOKENS)).astype(np.float32).tolist()
SPANS = [{"version": "3", "start": 0, "end": 1000}, {"version": "4", "start": 1000, "end": TOKENS}]
PROMPT: list[int] = RANDOM.integers(0, 150_000, 1024).tolist()
TEXT = "some text, " * TOKENS

Arrays = tuple[Int32Array, Float32Array]


def written(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def completion() -> bytes:
    strings = [f"token_id:{token}" for token in IDS]
    logprobs = {
        "text_offset": [12 * index for index in range(TOKENS)],
        "token_logprobs": LOGPROBS,
        "tokens": strings,
        "top_logprobs": [{s: logprob} for s, logprob in zip(strings, LOGPROBS, strict=True)],
    }
    choice = {
        "index": 0,
        "text": TEXT,
        "logprobs": logprobs,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": IDS,
        "prompt_token_ids": PROMPT,
    }
    return written({"id": "cmpl-1", "model": "tiny", "choices": [choice], "usage": {"n": 1}})


def token_route() -> bytes:
    content = [
        {"token_id": t, "logprob": p, "rank": 1,
         "top_logprobs": [{"token_id": t, "logprob": p, "rank": 1}]}
        for t, p in zip(IDS, LOGPROBS, strict=True)
    ]  # fmt: skip
    choice = {
        "index": 0,
        "finish_reason": "length",
        "token_ids": IDS,
        "weight_versions": SPANS,
        "logprobs": {"content": content},
    }
    return written({"request_id": "generate-tokens-1", "choices": [choice]})


def sglang() -> bytes:
    meta_info = {
        "id": "1",
        "finish_reason": {"type": "length", "length": TOKENS},
        "output_token_logprobs": [[p, t, None] for t, p in zip(IDS, LOGPROBS, strict=True)],
        "weight_versions": SPANS,
    }
    return written({"text": TEXT, "output_ids": IDS, "meta_info": meta_info})


def arrays(ids: list[int], logprobs: list[float]) -> Arrays:
    return np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32)


def of_completion(answer: Any) -> Arrays:
    choice = answer["choices"][0]
    return arrays(choice["token_ids"], choice["logprobs"]["token_logprobs"])


def of_token_route(answer: Any) -> Arrays:
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    return arrays(choice["token_ids"], [item["logprob"] for item in content])


def of_sglang(answer: Any) -> Arrays:
    pairs = answer["meta_info"]["output_token_logprobs"]
    return arrays([pair[1] for pair in pairs], [pair[0] for pair in pairs])


COMPLETION, TOKEN_ROUTE, SGLANG = completion(), token_route(), sglang()
VLLM_INFO = ServerInfo(token_in_token_out=True)


def check(result: Arrays) -> None:
    assert result[0].tolist() == IDS
    assert result[1].tolist() == LOGPROBS


def decode(benchmark: BenchmarkFixture, parse: Callable[[], Arrays]) -> None:
    check(benchmark(parse))


def dialect(dialect: VllmDialect | SglangDialect, body: bytes) -> Callable[[], Arrays]:
    response = HttpResponse(200, {"content-type": "application/json"}, body)

    def parse() -> Arrays:
        segment = dialect.parse_generate(response, VLLM_INFO)
        return segment.token_ids, segment.logprobs

    return parse


@pytest.mark.benchmark(group="vllm completion, 4096 tokens")
def test_vllm_completion_dialect(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, dialect(VllmDialect(), COMPLETION))


@pytest.mark.benchmark(group="vllm completion, 4096 tokens")
def test_vllm_completion_json(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, lambda: of_completion(json.loads(COMPLETION)))


@pytest.mark.benchmark(group="vllm completion, 4096 tokens")
def test_vllm_completion_orjson(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, lambda: of_completion(orjson.loads(COMPLETION)))


@pytest.mark.benchmark(group="vllm token route, 4096 tokens")
def test_vllm_token_route_dialect(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, dialect(VllmDialect(), TOKEN_ROUTE))


@pytest.mark.benchmark(group="vllm token route, 4096 tokens")
def test_vllm_token_route_json(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, lambda: of_token_route(json.loads(TOKEN_ROUTE)))


@pytest.mark.benchmark(group="vllm token route, 4096 tokens")
def test_vllm_token_route_orjson(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, lambda: of_token_route(orjson.loads(TOKEN_ROUTE)))


@pytest.mark.benchmark(group="sglang, 4096 tokens")
def test_sglang_dialect(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, dialect(SglangDialect(), SGLANG))


@pytest.mark.benchmark(group="sglang, 4096 tokens")
def test_sglang_json(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, lambda: of_sglang(json.loads(SGLANG)))


@pytest.mark.benchmark(group="sglang, 4096 tokens")
def test_sglang_orjson(benchmark: BenchmarkFixture) -> None:
    decode(benchmark, lambda: of_sglang(orjson.loads(SGLANG)))


SHORT = RANDOM.integers(0, 150_000, 1024).astype(np.int32)
LONG = RANDOM.integers(0, 150_000, 8192).astype(np.int32)


def encode(benchmark: BenchmarkFixture, ids: Int32Array, write: Callable[[], str | bytes]) -> None:
    assert json.loads(benchmark(write)) == ids.tolist()


@pytest.mark.benchmark(group="encode 1024 ids")
def test_encode_1024_core(benchmark: BenchmarkFixture) -> None:
    encode(benchmark, SHORT, lambda: encode_ids(SHORT))


@pytest.mark.benchmark(group="encode 1024 ids")
def test_encode_1024_json(benchmark: BenchmarkFixture) -> None:
    encode(benchmark, SHORT, lambda: json.dumps(SHORT.tolist()))


@pytest.mark.benchmark(group="encode 1024 ids")
def test_encode_1024_orjson(benchmark: BenchmarkFixture) -> None:
    option = orjson.OPT_SERIALIZE_NUMPY
    encode(benchmark, SHORT, lambda: orjson.dumps(SHORT, option=option))


@pytest.mark.benchmark(group="encode 8192 ids")
def test_encode_8192_core(benchmark: BenchmarkFixture) -> None:
    encode(benchmark, LONG, lambda: encode_ids(LONG))


@pytest.mark.benchmark(group="encode 8192 ids")
def test_encode_8192_json(benchmark: BenchmarkFixture) -> None:
    encode(benchmark, LONG, lambda: json.dumps(LONG.tolist()))


@pytest.mark.benchmark(group="encode 8192 ids")
def test_encode_8192_orjson(benchmark: BenchmarkFixture) -> None:
    option = orjson.OPT_SERIALIZE_NUMPY
    encode(benchmark, LONG, lambda: orjson.dumps(LONG, option=option))


@pytest.mark.parametrize(
    ("name", "ours", "read", "body"),
    [
        ("vllm completion", dialect(VllmDialect(), COMPLETION), of_completion, COMPLETION),
        ("vllm token route", dialect(VllmDialect(), TOKEN_ROUTE), of_token_route, TOKEN_ROUTE),
        ("sglang", dialect(SglangDialect(), SGLANG), of_sglang, SGLANG),
    ],
)
def test_targets_of_decoding(
    name: str, ours: Callable[[], Arrays], read: Callable[[Any], Arrays], body: bytes
) -> None:
    to_json = median_ratio(ours, lambda: read(json.loads(body)), rounds=31)
    to_orjson = median_ratio(ours, lambda: read(orjson.loads(body)), rounds=31)
    print(f"\n{name}: {to_json:.3f} of json, {to_orjson:.3f} of orjson")
    assert to_json <= 1 / 6
    assert to_orjson <= 1 / 3


@pytest.mark.parametrize("ids", [SHORT, LONG], ids=len)
def test_targets_of_encoding(ids: Int32Array) -> None:
    ratio = median_ratio(lambda: encode_ids(ids), lambda: json.dumps(ids.tolist()), rounds=101)
    print(f"\n{len(ids)} ids: {ratio:.3f} of json")
    assert ratio <= 1 / 8
