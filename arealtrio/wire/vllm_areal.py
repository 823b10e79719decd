"""vLLM behind AReaL's own server, ``areal_vllm_server``: its routes for pausing and for weights.

AReaL starts vLLM with routes of its own. They know one way to pause, which returns what is in
flight and drops the cache, and no label of the weights: versions are what this library pins when it
sends a request.

Source: AReaL, areal/engine/vllm_remote.py and areal/engine/vllm_ext/areal_vllm_server.py. There is
no recording of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..types import HttpRequest, PauseMode
from . import body
from .vllm import VllmDialect
from .weights import AdapterSpec, GroupPlace, TensorSpec, dtype_name


class ArealVllmDialect(VllmDialect):
    """Requests and answers of a vLLM that AReaL started. Immutable, like its base."""

    name = "vllm_areal"
    receives_adapters = True
    has_labels = False
    __slots__ = ()

    def pause(self, mode: PauseMode) -> HttpRequest:
        """Return what is in flight, and hold back what comes.

        Raises:
            ConfigError: For any mode but ``abort``.
        """
        if mode != "abort":
            raise ConfigError(f"AReaL's vLLM server pauses with mode='abort' alone, not {mode!r}")
        return body.post("/areal_pause_generation", {})

    def resume(self) -> HttpRequest:
        """Go on generating."""
        return body.post("/areal_continue_generation", {})

    def load_weights(self, path: str, version: int) -> Sequence[HttpRequest]:  # noqa: ARG002
        """Load; the cache went with the pause, and there is no label."""
        return (body.post("/areal_update_weights", {"model_path": path}),)

    def init_group(self, place: GroupPlace) -> HttpRequest:
        """Join the trainer's group; AReaL's server takes the port as a string."""
        question: dict[str, Any] = {
            "master_address": place.master_address,
            "master_port": str(place.master_port),
            "rank_offset": place.rank_offset,
            "world_size": place.world_size,
            "backend": place.backend,
            "group_name": place.group_name,
            **place.options,
        }
        return body.post("/areal_init_weights_update_group", question)

    def begin_update(self) -> HttpRequest | None:
        """Nothing."""
        return None

    def receive(
        self,
        tensors: Sequence[TensorSpec],
        group_name: str,
        *,
        last: bool,  # noqa: ARG002  nothing follows
        adapter: AdapterSpec | None = None,
    ) -> Sequence[HttpRequest]:
        """Say what comes, then receive it; of an adapter both requests say it."""
        meta: dict[str, Any] = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [dtype_name(tensor.dtype) for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "group_name": group_name,
        }
        if adapter is not None:
            meta |= _of_adapter(adapter)
            return (
                body.post("/areal_set_update_weight_meta_lora", meta),
                body.post("/areal_update_weights_lora_xccl", meta),
            )
        return (
            body.post("/areal_set_update_weight_meta", meta),
            body.post("/areal_update_weights_xccl", {}),
        )

    def end_update(self, version: int) -> Sequence[HttpRequest]:  # noqa: ARG002  no label
        """Nothing."""
        return ()


def _of_adapter(adapter: AdapterSpec) -> dict[str, Any]:
    return {
        "lora_name": adapter.name,
        "lora_int_id": adapter.number,
        "lora_target_modules": list(adapter.target_modules),
        "lora_rank": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_bias": adapter.bias,
        "base_model_name": adapter.base_model,
    }
