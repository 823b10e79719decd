"""SGLang's requests about weights that a trainer sends, about adapters, and about its memory.

Source: SGLang 0.5.23's managers/io_struct.py, managers/scheduler_components/weight_updater.py and
entrypoints/http_server.py; these routes need GPUs and are not recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from ..types import HttpRequest, HttpResponse
from . import body
from .status import NOT_JSON
from .weights import AdapterSpec, GroupPlace, TensorSpec, dtype_name

ALREADY_LOADED: Final = b"already loaded"


class _Refusal(msgspec.Struct):
    error_message: str = ""


class SglangWeights:
    """The weight routes of SGLang's native server."""

    receives_adapters = False
    has_labels = True
    # Newer servers take tensors between these two alone; older ones do not have them.
    optional_routes = frozenset({"/begin_weight_update", "/end_weight_update"})
    memory_tags: tuple[str, ...] = ("weights", "cuda_graph", "kv_cache")
    weights_survive_sleep = False  # but with --enable-weights-cpu-backup
    wakes_twice = False
    __slots__ = ()

    def init_group(self, place: GroupPlace) -> HttpRequest:
        """Join the trainer's group."""
        question = {
            "master_address": place.master_address,
            "master_port": place.master_port,
            "rank_offset": place.rank_offset,
            "world_size": place.world_size,
            "group_name": place.group_name,
            "backend": place.backend,
            **place.options,
        }
        if place.pp_rank is not None:
            question["pp_rank"] = place.pp_rank
        return body.post("/init_weights_update_group", question)

    def begin_update(self) -> HttpRequest | None:
        """Open a session; refused while one is open."""
        return body.post("/begin_weight_update", {})

    def receive(
        self,
        tensors: Sequence[TensorSpec],
        group_name: str,
        *,
        last: bool,
        adapter: AdapterSpec | None = None,  # noqa: ARG002  it comes from disk
    ) -> Sequence[HttpRequest]:
        """Receive tensors; with the last of them the cache that the old weights made is dropped."""
        question = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [dtype_name(tensor.dtype) for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "group_name": group_name,
            "flush_cache": last,
            "abort_all_requests": False,
        }
        return (body.post("/update_weights_from_distributed", question),)

    def end_update(self, version: int) -> Sequence[HttpRequest]:
        """Close the session, then set the label; left alone, that would abort every request."""
        label = {"new_version": str(version), "abort_all_requests": False}
        close = body.post("/end_weight_update", {})
        return (close, body.post("/update_weight_version", label))

    def reopen_update(self) -> HttpRequest | None:
        """Close the session of an update that failed."""
        return body.post("/end_weight_update", {})

    def load_adapter(self, name: str, path: str) -> HttpRequest:
        """Load; a name that is there is refused."""
        return body.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def has_adapter(self, response: HttpResponse) -> bool:
        """Whether a load was refused because of its name: nothing is said of what has it."""
        if response.status != 400 or ALREADY_LOADED not in response.body:
            return False
        try:
            refusal = msgspec.json.decode(response.body, type=_Refusal)
        except NOT_JSON:
            return False
        return ALREADY_LOADED.decode() in refusal.error_message

    def unload_adapter(self, name: str) -> HttpRequest:
        """Forget an adapter, once SGLang's own requests with it are done."""
        return body.post("/unload_lora_adapter", {"lora_name": name})

    def sleep(
        self,
        tags: Sequence[str],
        *,
        keep_weights: bool,  # noqa: ARG002  the server decides
    ) -> HttpRequest | None:
        """Let go of memory, by name, so that what is to be taken back is known.

        A server that runs anything dies of it, as does one that is told to let go of what it has
        not, or to take back what it has.
        """
        return body.post("/release_memory_occupation", {"tags": list(tags)})

    def wake(self, tag: str) -> HttpRequest:
        """Take memory back."""
        return body.post("/resume_memory_occupation", {"tags": [tag]})
