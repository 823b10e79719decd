"""Both dialects' requests about weights that do not come from the server's disk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from arealtrio.errors import ConfigError, ProtocolError, RequestRejected, ServerError
from arealtrio.types import HttpRequest, HttpResponse
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect
from arealtrio.wire.vllm_areal import ArealVllmDialect
from arealtrio.wire.weights import GroupPlace, TensorSpec

from ..golden import exchange

VLLM, SGLANG, AREAL = VllmDialect(), SglangDialect(), ArealVllmDialect()
PLACE = GroupPlace(
    master_address="10.0.0.1", master_port=29500, rank_offset=3, world_size=5, group_name="g"
)
TENSORS = (TensorSpec("a", "torch.bfloat16", (2, 3)), TensorSpec("b", "float32", ()))


def body(request: HttpRequest) -> Any:
    assert request.method == "POST"
    return json.loads(request.body)


def recorded_question(name: str) -> tuple[str, Any]:
    asked = exchange.question("vllm-0.32.0", f"{name}.json")
    return asked["path"], asked["json"]


def answer(text: str, status: int = 200, content_type: str = "application/json") -> HttpResponse:
    return HttpResponse(status, {"content-type": content_type}, text.encode())


def test_vllm_joins_a_group() -> None:
    request = VLLM.init_group(PLACE)
    assert request.path == recorded_question("wt_init")[0]
    info = {
        "master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 3, "world_size": 5,
    }  # fmt: skip
    assert body(request) == {"init_info": info}


def test_vllm_receives_between_start_and_finish() -> None:
    begin = VLLM.begin_update()
    (receive,) = VLLM.receive(TENSORS, "g", last=True)
    reset, finish = VLLM.end_update(3)
    assert begin is not None
    assert (begin.path, begin.body) == (recorded_question("wt_start")[0], b"")
    assert receive.path == recorded_question("wt_update")[0]
    assert body(receive) == {
        "update_info": {
            "names": ["a", "b"],
            "dtype_names": ["bfloat16", "float32"],
            "shapes": [[2, 3], []],
        }
    }
    assert reset.path.partition("?")[0] == recorded_question("ku_reset")[0]
    assert (finish.path, body(finish)) == ("/finish_weight_update", {"weight_version": "3"})
    assert finish.path == recorded_question("wt_finish")[0]


@pytest.mark.parametrize(
    "name",
    [
        "wt_init",
        "wt_start",
        "wt_update",
        "wt_finish",
        "wt_reset_prefix",
        "sleep_cpu",
        "wake_up_cpu",
    ],
)
def test_vllm_says_done(name: str) -> None:
    VLLM.parse_control(exchange.answer("vllm-0.32.0", f"{name}.json"))


@pytest.mark.parametrize("name", ["err_finish_no_start", "err_update_weights_no_start"])
def test_vllm_says_that_it_failed(name: str) -> None:
    with pytest.raises((RequestRejected, ServerError)) as caught:
        VLLM.parse_control(exchange.answer("vllm-0.32.0", f"{name}.json"))
    assert "start_weight_update" in str(caught.value)


def test_vllm_sleeps_and_wakes_in_parts() -> None:
    one = VLLM.sleep(VLLM.memory_tags, keep_weights=True)
    two = VLLM.sleep(["weights"], keep_weights=False)
    assert one is not None
    assert two is not None
    assert (one.path, two.path) == ("/sleep?level=1", "/sleep?level=2")
    assert VLLM.sleep(["kv_cache"], keep_weights=True) is None
    assert VLLM.wake("kv_cache").path == "/wake_up?tags=kv_cache"


def test_vllm_takes_adapters() -> None:
    load = VLLM.load_adapter("x-v3", "/a")
    assert load.path == "/v1/load_lora_adapter"
    assert body(load) == {"lora_name": "x-v3", "lora_path": "/a", "load_inplace": True}
    assert body(VLLM.unload_adapter("x-v3")) == {"lora_name": "x-v3"}
    VLLM.parse_control(
        answer("Success: LoRA adapter 'x-v3' added successfully.", 200, "text/plain")
    )
    with pytest.raises(ProtocolError):
        VLLM.parse_control(answer("<html>Welcome</html>", 200, "text/html"))


def test_sglang_joins_a_group_of_one_stage_or_of_all() -> None:
    asked = body(SGLANG.init_group(PLACE))
    assert asked == {
        "master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 3, "world_size": 5,
        "group_name": "g", "backend": "nccl",
    }  # fmt: skip
    stage = GroupPlace(
        master_address="h", master_port=1, rank_offset=1, world_size=3, group_name="g_0", pp_rank=0
    )
    assert body(SGLANG.init_group(stage))["pp_rank"] == 0


def test_sglang_receives_in_a_session_and_drops_its_cache_last() -> None:
    begin = SGLANG.begin_update()
    assert begin is not None
    assert begin.path in SGLANG.optional_routes
    (first,) = SGLANG.receive(TENSORS, "g", last=False)
    (last,) = SGLANG.receive(TENSORS, "g", last=True)
    assert body(first) == {
        "names": ["a", "b"], "dtypes": ["bfloat16", "float32"], "shapes": [[2, 3], []],
        "group_name": "g", "flush_cache": False, "abort_all_requests": False,
    }  # fmt: skip
    assert body(last)["flush_cache"]
    end, label = SGLANG.end_update(3)
    assert end.path in SGLANG.optional_routes
    assert label == SGLANG.label_weights(3)


def test_sglang_names_the_memory_that_it_lets_go_of() -> None:
    tags = list(SGLANG.memory_tags)
    assert tags[0] == "weights"
    release = SGLANG.sleep(tags[:2], keep_weights=True)
    assert release is not None
    assert body(release) == {"tags": tags[:2]}
    assert body(SGLANG.wake("weights")) == {"tags": ["weights"]}
    SGLANG.parse_control(answer("null"))


def test_sglang_has_an_adapter_already() -> None:
    def refusal(reason: str) -> HttpResponse:
        return answer(json.dumps({"success": False, "error_message": reason}), 400)

    there = refusal("Failed to load LoRA adapter x-v3 because it is already loaded")
    assert SGLANG.has_adapter(there)
    assert not VLLM.has_adapter(there)
    no_path, no_json = refusal("no such directory"), answer("already loaded", 400, "text/plain")
    assert not SGLANG.has_adapter(no_path)
    assert not SGLANG.has_adapter(no_json)
    for wrong in (there, no_path, no_json):
        with pytest.raises(RequestRejected):
            SGLANG.parse_control(wrong)


def test_areals_server_has_routes_of_its_own() -> None:
    init = AREAL.init_group(PLACE)
    assert init.path == "/areal_init_weights_update_group"
    assert body(init)["master_port"] == "29500"
    assert AREAL.begin_update() is None
    meta, receive = AREAL.receive(TENSORS, "g", last=False)
    assert meta.path == "/areal_set_update_weight_meta"
    assert body(meta) == {
        "names": ["a", "b"], "dtypes": ["bfloat16", "float32"], "shapes": [[2, 3], []],
        "group_name": "g",
    }  # fmt: skip
    assert (receive.path, body(receive)) == ("/areal_update_weights_xccl", {})
    assert AREAL.end_update(1) == ()
    (load,) = AREAL.load_weights("/w", 1)
    assert (load.path, body(load)) == ("/areal_update_weights", {"model_path": "/w"})
    assert AREAL.pause("abort").path == "/areal_pause_generation"
    assert AREAL.resume().path == "/areal_continue_generation"
    with pytest.raises(ConfigError, match="abort"):
        AREAL.pause("keep")
