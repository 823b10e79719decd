"""Every field of GenerationHyperparameters changes what a server of either dialect is asked."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgspec
import pytest

from arealtrio.config import RolloutConfig
from arealtrio.engine import open_engine
from arealtrio.errors import ConnectFailed
from arealtrio.testing import EOS, SimulatedServerSettings, open_fleet
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse, ModelRequest

from .faulty import Faulty

TOKENS, COMPLETIONS, SGLANG = "/inference/v1/generate", "/v1/completions", "/generate"
OTHER: dict[str, Any] = {
    "max_new_tokens": 9,
    "min_new_tokens": 3,
    "max_tokens": 7,
    "greedy": True,
    "top_p": 0.5,
    "top_k": 11,
    "min_p": 0.25,
    "temperature": 0,  # any other makes the engine warn of what the logprobs are
    "stop_token_ids": (8,),
    "stop": ("end",),
    "ignore_eos": True,
    "skip_special_tokens": False,
    "return_routed_experts": True,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.5,
    "seed": 3,
    "lora_name": "math",
}
# A request is one answer; and a vLLM tells experts by a setting of its own, not by a request's.
NOT_SENT = {(route, "n_samples") for route in (TOKENS, COMPLETIONS, SGLANG)} | {
    (TOKENS, "return_routed_experts"),
    (COMPLETIONS, "return_routed_experts"),
}


async def asked(route: str, **options: Any) -> dict[str, Any]:
    """The body of the request for an answer, which no server gets to see."""
    dialect: Any = "sglang" if route == SGLANG else "vllm"
    bodies: list[dict[str, Any]] = []

    def keep(_: str, request: HttpRequest) -> HttpResponse | None:
        if request.path == route and request.method == "POST":
            bodies.append(msgspec.json.decode(request.body))
            raise ConnectFailed("the test has what it wants")
        if request.path == TOKENS and route == COMPLETIONS:
            return HttpResponse(404, {}, b'{"detail":"Not Found"}')
        return None

    async with open_fleet([SimulatedServerSettings(dialect=dialect)]) as fleet:
        faulty = Faulty(fleet)
        faulty.fault = keep
        config = RolloutConfig(
            servers=fleet.addresses, backend=dialect, vocab_size=2 * EOS, max_failovers=0
        )
        async with open_engine(config, transport=faulty) as engine:
            (server,) = engine.pool.servers
            server.info = replace(server.info, tells_experts=True)
            gconfig = GenerationHyperparameters(**options)
            with pytest.raises(ConnectFailed):
                await engine.agenerate(ModelRequest([5, 6], gconfig, rid="r"))
    (body,) = bodies
    return body


@pytest.mark.parametrize("route", [TOKENS, COMPLETIONS, SGLANG])
async def test_each_option_is_sent(route: str) -> None:
    usual = await asked(route)
    names = {field.name for field in fields(GenerationHyperparameters)}
    assert names == {*OTHER, "n_samples"}  # a new one has to be looked at here, too
    sent = {name for name in OTHER if await asked(route, **{name: OTHER[name]}) != usual}
    assert sent == {name for name in names if (route, name) not in NOT_SENT}
