"""vLLM's requests about weights that a trainer sends, about adapters, and about sleep.

Sources: recordings wt_*, ku_*, sleep_cpu, wake_up_cpu in tests/golden/vllm-0.32.0; for what needs
GPUs or ``--enable-lora``, which is not recorded, vLLM 0.32.0's
distributed/weight_transfer/nccl_common.py and nccl_engine.py, entrypoints/rl/online/api_router.py
and entrypoints/serve/lora.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlencode

from ..types import HttpRequest, HttpResponse
from . import body
from .weights import AdapterSpec, GroupPlace, TensorSpec, dtype_name

RESET_CACHE: Final = "/reset_prefix_cache?reset_running_requests=true"


class VllmWeights:
    """The weight transfer of vLLM itself, for servers with ``--weight-transfer-config`` nccl."""

    receives_adapters = False
    has_labels = True
    optional_routes: frozenset[str] = frozenset()
    memory_tags: tuple[str, ...] = ("weights", "kv_cache")
    weights_survive_sleep = True  # in the host's memory, at level 1
    wakes_twice = True  # it warns in its log
    __slots__ = ()

    def init_group(self, place: GroupPlace) -> HttpRequest:
        """Join the trainer's group; a vLLM has one, so its name is not sent."""
        info = {
            "master_address": place.master_address,
            "master_port": place.master_port,
            "rank_offset": place.rank_offset,
            "world_size": place.world_size,
            **place.options,
        }
        return body.post("/init_weight_transfer_engine", {"init_info": info})

    def begin_update(self) -> HttpRequest | None:
        """Make ready; said again after a failure, it starts anew."""
        return body.post("/start_weight_update")

    def receive(
        self,
        tensors: Sequence[TensorSpec],
        group_name: str,  # noqa: ARG002  there is one group
        *,
        last: bool,  # noqa: ARG002  the end is told by a request of its own
        adapter: AdapterSpec | None = None,  # noqa: ARG002  it comes from disk
    ) -> Sequence[HttpRequest]:
        """Receive tensors."""
        info: dict[str, Any] = {
            "names": [tensor.name for tensor in tensors],
            "dtype_names": [dtype_name(tensor.dtype) for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        return (body.post("/update_weights", {"update_info": info}),)

    def end_update(self, version: int) -> Sequence[HttpRequest]:
        """Drop the cache, as after a load from disk, then finish with the label."""
        finish = {"weight_version": str(version)}
        return (body.post(RESET_CACHE), body.post("/finish_weight_update", finish))

    def reopen_update(self) -> HttpRequest | None:
        """Nothing: a start is a new start."""
        return None

    def load_adapter(self, name: str, path: str) -> HttpRequest:
        """Load, also over one of that name; needs ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``."""
        question = {"lora_name": name, "lora_path": path, "load_inplace": True}
        return body.post("/v1/load_lora_adapter", question)

    def has_adapter(self, response: HttpResponse) -> bool:  # noqa: ARG002  it is replaced
        """Never."""
        return False

    def unload_adapter(self, name: str) -> HttpRequest:
        """Forget an adapter."""
        return body.post("/v1/unload_lora_adapter", {"lora_name": name})

    def sleep(self, tags: Sequence[str], *, keep_weights: bool) -> HttpRequest | None:
        """Level 1 keeps the weights in the host's memory, level 2 nowhere.

        With the weights goes whatever else is awake; while they sleep it warns in its log, and lets
        go of nothing (vLLM 0.32.0's v1/executor/abstract.py).
        """
        if "weights" not in tags:
            return None
        return body.post(f"/sleep?level={1 if keep_weights else 2}")

    def wake(self, tag: str) -> HttpRequest:
        """Take memory back; with the last of it vLLM goes on generating by itself."""
        return body.post("/wake_up?" + urlencode({"tags": tag}))
